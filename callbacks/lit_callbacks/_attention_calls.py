"""From a torch function that computes attention to the statistics of what it attended to."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_callbacks._intercept import Call
from lit_callbacks.functional import AttentionStatistics, attention_statistics, softmax_statistics

_ATTENTION = re.compile(r"attn|attention|attend", re.IGNORECASE)
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def looks_like_attention(name: str, module: nn.Module) -> bool:
    """Whether a module's class, its name or that of its parent says so."""
    return any(_ATTENTION.search(word) for word in [type(module).__name__, *name.split(".")[-2:]])


def from_scaled_dot_product(call: Call) -> AttentionStatistics:
    """Of a call of ``F.scaled_dot_product_attention``; dropout is left out."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    q, k, _, mask, _, is_causal, scale = [call.argument(i, name) for i, name in enumerate(names)]
    if q.dim() == 3:  # one head
        q, k = q.unsqueeze(1), k.unsqueeze(1)
        mask = mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask
    return attention_statistics(q, k, mask, bool(is_causal), scale)


def from_softmax(call: Call) -> AttentionStatistics | None:
    """Of a softmax over the last dimension of something of the shape of attention scores, in an attention module."""
    scores = call.args[0] if call.args else call.kwargs.get("input")
    if not isinstance(scores, Tensor) or scores.dim() not in (3, 4) or scores.size(-1) < 2:
        return None
    if call.argument(1, "dim") not in (-1, scores.dim() - 1) or not looks_like_attention(call.name, call.module):
        return None
    return softmax_statistics(scores)


def from_multi_head(call: Call) -> AttentionStatistics:
    """Of a call of ``F.multi_head_attention_forward``: the projections are computed again, the weights are not kept."""
    bound = _MULTI_HEAD.bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    a = bound.arguments
    batched = a["query"].dim() == 3
    query, key = (a["query"], a["key"]) if batched else (a["query"].unsqueeze(1), a["key"].unsqueeze(1))
    heads, (length, batch, width) = a["num_heads"], query.shape
    if a["use_separate_proj_weight"]:
        q_weight, k_weight = a["q_proj_weight"], a["k_proj_weight"]
    else:
        q_weight, k_weight, _ = a["in_proj_weight"].chunk(3)
    q_bias, k_bias, _ = (None, None, None) if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)
    q = F.linear(query, q_weight, q_bias)
    k = F.linear(key, k_weight, k_bias)
    extra = 0
    if a["bias_k"] is not None:
        k, extra = torch.cat([k, a["bias_k"].expand(1, batch, width)]), extra + 1
    if a["add_zero_attn"]:
        k, extra = torch.cat([k, k.new_zeros(1, batch, width)]), extra + 1
    q, k = (x.view(len(x), batch, heads, width // heads).permute(1, 2, 0, 3) for x in (q, k))
    if a["static_k"] is not None:
        k = a["static_k"].view(batch, heads, -1, width // heads)
    return attention_statistics(q, k, _merged_mask(a, batch, heads, length, extra))


def _merged_mask(a: Mapping[str, Any], batch: int, heads: int, length: int, extra: int) -> Tensor | None:
    """One additive mask of shape ``(batch or 1, heads or 1, length or 1, keys)``; ``extra`` last keys are visible."""
    mask, padding = a["attn_mask"], a["key_padding_mask"]
    parts = []
    if mask is not None:
        parts.append(_additive(mask.view(batch, heads, length, -1) if mask.dim() == 3 else mask[None, None]))
    if padding is not None:
        parts.append(_additive(padding.view(batch, 1, 1, -1)))
    if not parts:
        return None
    return F.pad(sum(parts[1:], parts[0]), (0, extra))


def _additive(mask: Tensor) -> Tensor:
    # True means hidden here, unlike in scaled_dot_product_attention.
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -1e30) if mask.dtype == torch.bool else mask
