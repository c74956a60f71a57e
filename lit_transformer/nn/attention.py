"""Attention, to the sequence itself and to another one.

Shapes: B batch, T queries, S keys, D d_model, H heads, K heads of keys and values, d features per head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.flex import attend_blocks
from lit_transformer.nn.masks import Mask
from lit_transformer.nn.norm import make_head_norm
from lit_transformer.nn.positions import Places, RotaryPositions


class KeyValueCache:
    """Keys and values of the tokens one layer has seen, so that generation computes each of them once.

    Args:
        max_length: Tokens it has room for.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self.memory: tuple[Tensor, Tensor] | None = None
        """Keys and values of the sequence that a decoder attends to, each ``(B, K, S, d)``."""
        self._store: Tensor | None = None

    def append(self, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values; all of them so far, each ``(B, K, S, d)``."""
        if self._store is None:
            b, h, _, d = k_BKTd.shape
            self._store = k_BKTd.new_empty(2, b, h, self.max_length, d)
        end = self.length + k_BKTd.size(2)
        self._store[0, :, :, self.length : end] = k_BKTd
        self._store[1, :, :, self.length : end] = v_BKTd
        self.length = end
        return self._store[0, :, :, :end], self._store[1, :, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Go on with some rows of the batch, in this order, as beam search does."""
        if self._store is not None:
            self._store = self._store[:, rows]
        if self.memory is not None:
            self.memory = self.memory[0][rows], self.memory[1][rows]


def attend(q_BHTd: Tensor, k_BKSd: Tensor, v_BKSd: Tensor, mask: Mask = None, dropout: float = 0.0) -> Tensor:
    """Scaled dot products of queries with the keys they see; see :mod:`lit_transformer.nn.masks` for which those are.

    Through torch's fused kernel, which is also where monitors look for it, but for blocks.
    """
    if isinstance(mask, BlockMask):
        return attend_blocks(q_BHTd, k_BKSd, v_BKSd, mask)
    shared = q_BHTd.size(1) != k_BKSd.size(1)
    causal, visible = isinstance(mask, str), mask if isinstance(mask, Tensor) else None
    return F.scaled_dot_product_attention(
        q_BHTd, k_BKSd, v_BKSd, attn_mask=visible, dropout_p=dropout, is_causal=causal, enable_gqa=shared
    )


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, 3.2.2); several heads may share keys and values.

    Args:
        config: The model's configuration.
        rotary: Rotary positions, shared by all layers, or None.

    Shapes:
        ``(B, T, D)`` to ``(B, T, D)``.
    """

    def __init__(self, config: TransformerConfig, rotary: RotaryPositions | None = None) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        self.dropout, self.rotary = config.attention_dropout, rotary
        heads = self.n_heads + 2 * self.n_kv_heads
        self.qkv = nn.Linear(config.d_model, heads * self.head_dim, bias=config.bias)
        self.q_norm, self.k_norm = make_head_norm(config), make_head_norm(config)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(
        self, x_BTD: Tensor, mask: Mask = "causal", places: Places = 0, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend to what ``mask`` lets each token see, those in ``cache`` included; ``x`` is at ``places``."""
        b, t, _ = x_BTD.shape
        q, k, v = self._project(x_BTD, places)
        if cache is not None:
            k, v = cache.append(k, v)
        y_BHTd = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        out: Tensor = self.out(y_BHTd.transpose(1, 2).reshape(b, t, -1))
        return out

    def _project(self, x_BTD: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x_BTD.shape
        if self.n_kv_heads == self.n_heads:  # queries and keys are normalised and turned together
            qkv = self.qkv(x_BTD).view(b, t, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # 3 B H T d
            qk, v = qkv[:2], qkv[2]
            if self.q_norm is not None and self.k_norm is not None:
                qk = torch.stack((self.q_norm(qk[0]), self.k_norm(qk[1])))
            q, k = self.rotary(qk, places) if self.rotary is not None else qk
            return q, k, v
        heads = self.qkv(x_BTD).view(b, t, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, places), self.rotary(k, places)
        return q, k, v


class CrossAttention(nn.Module):
    """Multi-head attention to another sequence (Vaswani et al. 2017, 3.2.3); without positions, which are in it.

    Args:
        config: The model's configuration.

    Shapes:
        ``(B, T, D)`` and ``(B, S, D)`` to ``(B, T, D)``.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        self.dropout = config.attention_dropout
        self.q = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.kv = nn.Linear(config.d_model, 2 * self.n_kv_heads * self.head_dim, bias=config.bias)
        self.q_norm, self.k_norm = make_head_norm(config), make_head_norm(config)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(
        self, x_BTD: Tensor, memory_BSD: Tensor, mask: Mask = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend to the positions of ``memory`` that ``mask`` lets be seen."""
        b, t, _ = x_BTD.shape
        q = self.q(x_BTD).view(b, t, self.n_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None:
            q = self.q_norm(q)
        known = cache.memory if cache is not None else None
        k, v = self._keys_and_values(memory_BSD) if known is None else known
        if cache is not None:
            cache.memory = k, v
        y_BHTd = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        out: Tensor = self.out(y_BHTd.transpose(1, 2).reshape(b, t, -1))
        return out

    def _keys_and_values(self, memory_BSD: Tensor) -> tuple[Tensor, Tensor]:
        b, s, _ = memory_BSD.shape
        k, v = self.kv(memory_BSD).view(b, s, 2, self.n_kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return k if self.k_norm is None else self.k_norm(k), v
