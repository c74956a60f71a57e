"""Token ids that no embedding has."""

import torch
from torch import Tensor


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary, if they are on the CPU; on a device, looking would stop the device.

    Raises:
        IndexError: If there is one; it says where.

    Cost: a pass over the ids, some microseconds.

    Example:
        >>> check_ids(torch.tensor([[0, 1], [2, 9]]), vocab_size=5)
        Traceback (most recent call last):
        IndexError: token id 9 at row 1, position 1 is not in the vocabulary of 5: expected 0 to 4; do tokenizer and \
model belong together?
    """
    if torch.compiler.is_compiling() or ids.device.type != "cpu" or not ids.numel():
        return
    low, high = ids.aminmax()
    if low >= 0 and high < vocab_size:
        return
    *row, position = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
    where = f"row {', '.join(map(str, row))}, position {position}" if row else f"position {position}"
    raise IndexError(
        f"token id {int(ids[(*row, position)])} at {where} is not in the vocabulary of "
        f"{vocab_size}: expected 0 to {vocab_size - 1}; do tokenizer and model belong together?"
    )
