"""Token ids that no embedding has."""

import torch
from torch import Tensor


def check_ids(ids_BT: Tensor, vocab_size: int) -> None:
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
    if torch.compiler.is_compiling() or ids_BT.device.type != "cpu" or not ids_BT.numel():
        return
    low, high = ids_BT.aminmax()
    if low >= 0 and high < vocab_size:
        return
    row, position = ((ids_BT < 0) | (ids_BT >= vocab_size)).nonzero()[0].tolist()
    raise IndexError(
        f"token id {int(ids_BT[row, position])} at row {row}, position {position} is not in the vocabulary of "
        f"{vocab_size}: expected 0 to {vocab_size - 1}; do tokenizer and model belong together?"
    )
