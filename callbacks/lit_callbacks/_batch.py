"""How many samples and tokens are in a batch of any kind?"""

from collections.abc import Iterator, Mapping
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
    samples = tokens = 0
    for tensor in _tensors(batch):
        samples = samples or (len(tensor) if tensor.dim() else 1)
        if tensor.dim() == 2 and not tensor.is_floating_point() and not tensor.is_complex():
            tokens = tensor.numel()
            break
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return samples, ids.numel() if isinstance(ids, Tensor) else tokens


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)
