"""Sliding windows by flex attention, which leaves out the blocks that no query sees (Dong et al. 2024).

For GPUs, and without dropout, which it does not have; monitors of ``F.scaled_dot_product_attention`` do not see it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SMALLEST_HEAD = 16
"""Features per head that its kernels need."""


def is_near(distance: Tensor, causal: bool, window: int) -> Tensor:
    """Whether a key that is ``distance`` behind the query is in its window."""
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def window_blocks(length: int, causal: bool, window: int, device: torch.device) -> BlockMask:
    """The blocks of queries and keys that have something in common."""

    def near(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_near(query - key, causal, window)

    return create_block_mask(near, None, None, length, length, device=str(device))


def attend_blocks(q_BHTd: Tensor, k_BKTd: Tensor, v_BKTd: Tensor, blocks: BlockMask) -> Tensor:
    """Attention in these blocks alone."""
    shared = q_BHTd.size(1) != k_BKTd.size(1)
    out: Tensor = _kernel(q_BHTd.is_cuda)(q_BHTd, k_BKTd, v_BKTd, block_mask=blocks, enable_gqa=shared)
    return out


@functools.cache
def _kernel(compiled: bool) -> Callable[..., Any]:
    kernel: Callable[..., Any] = flex_attention  # as it is, it computes all blocks
    return torch.compile(kernel) if compiled else kernel
