"""Which keys a query sees.

Documents that share a sequence, each token with the number of its own, do not see each other.

A mask is ``"causal"``, each query sees the keys up to its own place; ``None``, all; a boolean tensor that can be
broadcast to ``(B, H, T, S)``, true where a key is seen; or blocks for :mod:`lit_transformer.nn.flex`.

Shapes: B batch, H heads, T queries, S keys.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from lit_transformer.nn.flex import is_near, window_blocks

Mask = Tensor | BlockMask | Literal["causal"] | None


def causal_mask(
    t: int,
    start: int,
    window: int | None,
    device: torch.device,
    blocks: bool = False,
    documents_BT: Tensor | None = None,
) -> Mask:
    """Queries at places ``start`` to ``start + t`` see the keys up to their own place, or the last ``window`` of them.

    With ``blocks``, a window from the start is given as blocks, unless there are documents.

    Example:
        >>> causal_mask(3, 0, None, torch.device("cpu"))
        'causal'
        >>> causal_mask(3, 0, 2, torch.device("cpu")).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    if documents_BT is not None:
        return same_document(documents_BT) & is_near(_distance(t, 0, device), True, window or t)
    if window is None or window >= start + t:
        if start == 0:
            return "causal"
        if t == 1:
            return None
        window = start + t
    elif blocks and start == 0:
        return window_blocks(t, True, window, device)
    return is_near(_distance(t, start, device), True, window)


def bidirectional_mask(
    length: int,
    window: int | None,
    real_BS: Tensor | None,
    device: torch.device,
    blocks: bool = False,
    documents_BS: Tensor | None = None,
) -> Mask:
    """Every token sees the real ones, or those less than ``window`` away.

    A row without any real token sees all: softmax over nothing would be NaN.

    Args:
        length: Of the sequence.
        window: How far to either side, itself included.
        real_BS: True where a token is no padding; None if none is.
        device: Where the mask is used.
        blocks: Whether a window without padding and documents is given as blocks.
        documents_BS: Which document each token is of.

    Example:
        >>> bidirectional_mask(3, 2, None, torch.device("cpu")).int().tolist()
        [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """
    near = None if documents_BS is None else same_document(documents_BS)
    if window is not None and window < length:
        if blocks and real_BS is None and near is None:
            return window_blocks(length, False, window, device)
        in_window = is_near(_distance(length, 0, device), False, window)
        near = in_window if near is None else near & in_window
    if real_BS is None:
        return near
    real_B11S = padding_mask(real_BS)
    if near is None:
        return real_B11S
    # A padded query may have no real token in its window; what it sees does not matter, but NaN would spread.
    return (real_B11S & near) | torch.eye(length, dtype=torch.bool, device=device)


def padding_mask(real_BS: Tensor) -> Tensor:
    """Every query sees the real keys, ``(B, 1, 1, S)``; in a row without any, all."""
    real_BS = real_BS.bool()
    return (real_BS | ~real_BS.any(dim=1, keepdim=True))[:, None, None]


def same_document(documents_BT: Tensor) -> Tensor:
    """Every query sees the keys of its own document, ``(B, 1, T, T)``."""
    return documents_BT[:, None, :, None] == documents_BT[:, None, None, :]


def _distance(t: int, start: int, device: torch.device) -> Tensor:
    """How far the key is behind the query, ``(T, S)``."""
    return torch.arange(start, start + t, device=device)[:, None] - torch.arange(start + t, device=device)
