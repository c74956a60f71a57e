"""Causal self-attention.

Shapes: B batch, T queries, S keys, D d_model, H heads, d features per head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.norm import make_head_norm
from lit_transformer.nn.positions import RotaryPositions


class KeyValueCache:
    """Keys and values of the tokens one layer has seen, so that generation computes each of them once.

    Args:
        max_length: Tokens it has room for.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._store: Tensor | None = None

    def append(self, k_BHTd: Tensor, v_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values; all of them so far, each ``(B, H, S, d)``."""
        if self._store is None:
            b, h, _, d = k_BHTd.shape
            self._store = k_BHTd.new_empty(2, b, h, self.max_length, d)
        end = self.length + k_BHTd.size(2)
        self._store[0, :, :, self.length : end] = k_BHTd
        self._store[1, :, :, self.length : end] = v_BHTd
        self.length = end
        return self._store[0, :, :, :end], self._store[1, :, :, :end]


def attend(q_BHTd: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention in which the last query sees all keys and each earlier one sees one key less.

    With as many queries as keys this is the usual causal mask. Always through torch's fused kernel, which is also
    where monitors look for it.
    """
    t, s = q_BHTd.size(2), k_BHSd.size(2)
    if t == s:
        return F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, dropout_p=dropout, is_causal=True)
    visible = torch.ones(t, s, dtype=torch.bool, device=q_BHTd.device).tril(s - t)
    return F.scaled_dot_product_attention(q_BHTd, k_BHSd, v_BHSd, attn_mask=visible, dropout_p=dropout)


class SelfAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, 3.2.2).

    Args:
        config: The model's configuration.
        rotary: Rotary positions, shared by all layers, or None.

    Shapes:
        ``(B, T, D)`` to ``(B, T, D)``.
    """

    def __init__(self, config: TransformerConfig, rotary: RotaryPositions | None = None) -> None:
        super().__init__()
        self.n_heads, self.dropout, self.rotary = config.n_heads, config.attention_dropout, rotary
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.q_norm, self.k_norm = make_head_norm(config), make_head_norm(config)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Attend to this and all earlier positions, those in ``cache`` included."""
        b, t, d_model = x_BTD.shape
        qkv = self.qkv(x_BTD).view(b, t, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # 3 B H T d
        start = cache.length if cache is not None else 0
        qk, v = qkv[:2], qkv[2]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.stack((self.q_norm(qk[0]), self.k_norm(qk[1])))
        q, k = self.rotary(qk, start) if self.rotary is not None else qk
        if cache is not None:
            k, v = cache.append(k, v)
        y_BHTd = attend(q, k, v, self.dropout if self.training else 0.0)
        out: Tensor = self.out(y_BHTd.transpose(1, 2).reshape(b, t, d_model))
        return out
