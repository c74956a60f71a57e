"""How many samples and tokens are in a batch of any kind?"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def samples_and_tokens(batch: Any) -> tuple[int, int]:
    """The first dimension of the first tensor; the elements of the tensor of token ids, padding included.

    Token ids are what a mapping has under ``input_ids``, else the first integer tensor of two dimensions.

    Returns:
        Samples and tokens, 0 where there are none.

    Example:
        >>> import torch
        >>> samples_and_tokens({"pixels": torch.zeros(4, 3, 8, 8), "input_ids": torch.zeros(4, 7, dtype=torch.long)})
        (4, 28)
        >>> samples_and_tokens((torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)))
        (4, 0)
    """
    # Asked about every batch, so without generators.
    if isinstance(batch, Tensor):
        samples = len(batch) if batch.dim() else 1
        has_ids = batch.dim() == 2 and not batch.is_floating_point() and not batch.is_complex()
        return samples, batch.numel() if has_ids else 0
    if isinstance(batch, tuple | list):
        return _first(batch)
    if isinstance(batch, Mapping):
        ids = batch.get("input_ids")
        samples, tokens = _first(batch.values())
        return samples, ids.numel() if isinstance(ids, Tensor) else tokens
    return 0, 0


def _first(parts: Iterable[Any]) -> tuple[int, int]:
    samples = 0
    for part in parts:
        of_part, tokens = samples_and_tokens(part)
        samples = samples or of_part
        if tokens:
            return samples, tokens
    return samples, 0
