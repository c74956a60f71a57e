"""Entropy and largest logit of attention."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MASKED = -1e4
"""Attention logits at or below this are masked: libraries write ``-inf``, the smallest number of a type, or -10000."""

ENTROPY_BINS = 100

_FAR = -1e30  # finite, so that exp(s) * s is 0 and not NaN


class AttentionStatistics(NamedTuple):
    """What is known of some attention rows, by head; tables add up, and maxima combine, over batches and ranks.

    Args:
        table: Shape ``(heads, ENTROPY_BINS + 3)``: a histogram of the rows over their normalised entropy from 0 to 1,
            then the number of rows, the sum of their normalised entropies, and the sum of their attention to key 0.
        largest: Shape ``(heads,)``: the largest visible attention logit.
    """

    table: Tensor
    largest: Tensor


def attention_statistics(
    q: Tensor, k: Tensor, mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> AttentionStatistics:
    r"""Entropy of the attention that ``softmax(scale * q @ k^T + mask)`` gives, without keeping its matrix.

    With the logits :math:`s` of a row shifted by their maximum and :math:`Z = \sum_j e^{s_j}`, the entropy is
    :math:`\log Z - \sum_j e^{s_j} s_j / Z`: one fp32 pass over blocks of queries, a fixed number of logits at a time.
    (The identity with ``sdpa(q, k, v=k)`` is faster, but knows no largest logit, and with an additive mask it is wrong
    by nats.) Entropy is divided by the logarithm of the number of visible keys, so that 1 is uniform. Rows that see
    one key or none are left out, and so are padded queries: those whose own key no query sees.

    Args:
        q: Shape ``(..., heads, T, d)``, any floating-point type.
        k: Shape ``(..., key_heads, S, d)``; ``heads`` is a multiple of ``key_heads``.
        mask: Boolean (True is visible) or additive, broadcastable to ``(..., heads, T, S)``.
        is_causal: Query ``i`` sees keys 0 to ``i``.
        scale: Factor of the logits; ``d ** -0.5`` by default.

    Returns:
        The statistics by head, fp32.

    Example:
        >>> table, largest = attention_statistics(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), is_causal=True)
        >>> table[:, ENTROPY_BINS:]  # rows that see 2 and 3 keys, uniformly: entropies 1 + 1, first key 1/2 + 1/3
        tensor([[2.0000, 2.0000, 0.8333],
                [2.0000, 2.0000, 0.8333]])
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return _from_projections(q, k, mask, is_causal, scale)


def softmax_statistics(scores: Tensor) -> AttentionStatistics:
    """As :func:`attention_statistics`, from the masked scores that a softmax over the last dimension is given.

    Args:
        scores: Shape ``(batch, heads, T, S)``, or ``(batch, T, S)``, which counts as one head.

    Returns:
        The statistics by head, fp32.

    Example:
        >>> softmax_statistics(torch.tensor([[[0.0, 50.0, 0.0]]])).largest
        tensor([50.])
    """
    scores = (scores.unsqueeze(1) if scores.dim() == 3 else scores).detach()
    visible = _visible_keys(scores, scores.size(-2))

    def logits(start: int, stop: int) -> Tensor:
        return scores[..., start:stop, :].float().clamp(min=_FAR)

    return _by_head(logits, scores.shape[:-1], scores.size(-1), visible)


def _from_projections(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> AttentionStatistics:
    if 1 < k.size(-3) < q.size(-3):
        k = k.repeat_interleave(q.size(-3) // k.size(-3), dim=-3)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    rows, keys = q.size(-2), k.size(-2)
    # Contiguous, because every block would be copied otherwise.
    q, k = (q.float() * scale).contiguous(), k.float().contiguous().transpose(-2, -1)

    def logits(start: int, stop: int) -> Tensor:
        seen = min(stop, keys) if is_causal else keys
        block = q[..., start:stop, :] @ k[..., :seen]
        if is_causal and seen > start:  # only the block's own columns hold keys that some of its rows must not see
            future = torch.ones(stop - start, seen - start, dtype=torch.bool, device=q.device).triu_(1)
            block[..., start:].masked_fill_(future, _FAR)
        if mask is not None:
            part = mask[..., start:stop, :] if mask.dim() > 1 and mask.size(-2) > 1 else mask
            block = block.masked_fill_(~part, _FAR) if mask.dtype == torch.bool else block.add_(part).clamp_(min=_FAR)
        return block

    if mask is not None:
        visible = _visible_keys(mask, rows)
    else:
        visible = torch.full((rows,), keys, device=q.device)
        if is_causal:
            visible = torch.arange(1, rows + 1, device=q.device).clamp_(max=keys)
    return _by_head(logits, q.shape[:-1], keys, visible)


def _visible_keys(mask: Tensor, rows: int) -> Tensor:
    """The number of visible keys of each row, 0 for padded queries; broadcastable to ``(..., heads, T)``."""
    seen = mask if mask.dtype == torch.bool else mask > MASKED
    visible = seen.sum(-1)
    if mask.dim() > 1 and rows == mask.size(-1):  # self-attention: key i belongs to query i
        visible = visible * seen.any(-2)
    return visible


@torch.no_grad()
def _by_head(
    logits: Callable[[int, int], Tensor], shape: torch.Size, keys: int, visible: Tensor
) -> AttentionStatistics:
    heads, rows = shape[-2:]
    # Enough to fill a GPU; on a CPU, what stays in its cache.
    budget = 2**18 if visible.device.type == "cpu" else 2**24
    size = max(1, budget // (shape[:-1].numel() * keys))
    # Written in place: small results kept between large blocks break up the heap, which then grows by a block each.
    entropies, firsts, largest = torch.empty(3, *shape, device=visible.device, dtype=torch.float32).unbind()
    for start in range(0, rows, size):
        s = logits(start, min(start + size, rows))
        top = s.amax(-1, keepdim=True)
        p = s.sub_(top).exp()
        total = p.sum(-1)
        here = slice(start, start + size)
        entropies[..., here] = total.log() - s.mul_(p).sum(-1) / total
        firsts[..., here] = p[..., 0] / total
        largest[..., here] = top.squeeze(-1)
    visible = visible.expand(shape)
    entropy = (entropies / visible.clamp(min=2).log()).clamp(0, 1)
    weight = (visible > 1).float()
    head = torch.arange(heads, device=entropy.device).view(-1, 1).expand(shape)
    bins = (entropy * ENTROPY_BINS).long().clamp_(0, ENTROPY_BINS - 1) + head * ENTROPY_BINS
    histogram = torch.zeros(heads * ENTROPY_BINS, device=entropy.device, dtype=torch.float32)
    histogram.index_add_(0, bins.flatten(), weight.flatten())
    sums = [_sum_by_head(x) for x in (weight, entropy * weight, firsts * weight)]
    top_logits = largest.masked_fill(visible == 0, -torch.inf)
    return AttentionStatistics(
        torch.cat([histogram.view(heads, -1), torch.stack(sums, -1)], -1),
        top_logits.movedim(-2, 0).flatten(1).amax(-1),
    )


def _sum_by_head(values: Tensor) -> Tensor:
    return values.movedim(-2, 0).flatten(1).sum(-1)
