"""Whole documents side by side in blocks, none of which sees another."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lit_transformer.data.batching.loader import Batch, Blocks
from lit_transformer.data.batching.order import Ids
from lit_transformer.objectives import IGNORED


def pack(lengths: Ids, size: int) -> list[list[int]]:
    """Put pieces into blocks, the longest first, each where the least room is left: best-fit decreasing.

    At most 11/9 of the fewest blocks there could be, and a few more (Johnson et al. 1974); of text, less than 1 % of
    the room is left over as a rule (Ding et al. 2024, *Fewer Truncations Improve Language Modeling*).

    Args:
        lengths: Of the pieces, each at least 1 and at most ``size``.
        size: Of a block.

    Returns:
        The places in ``lengths`` of the pieces of each block.

    Cost: a microsecond or two a piece.

    Example:
        >>> pack(np.array([2, 5, 3, 4, 2]), size=8)
        [[1, 2], [3, 0, 4]]
    """
    blocks: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(size)]
    there = 0  # bit r is set where some block has room for r: the least room that is enough is one look away
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        enough = there >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            block = by_room[room].pop()
            if not by_room[room]:
                there ^= 1 << room
            blocks[block].append(piece)
        else:
            room, block = size, len(blocks)
            blocks.append([piece])
        if left := room - length:
            by_room[left].append(block)
            there |= 1 << left
    return blocks


class PackedBlocks(Blocks):
    """Blocks of whole documents, or of the pieces that a longer one is cut into.

    Each token of a document but the first is a target once, and predicted from those before it in its piece alone: a
    block says of a piece what the piece would say by itself.

    Args:
        path: Token ids, each document ended by a token of its own; beside it, in ``<name>.documents.npy``, where each
            begins, and at last the number of tokens.
        block_size: Tokens in a block.

    Shapes:
        A batch is ``input_ids``, ``targets`` and ``document_ids`` of ``(batch, block_size)`` and ``sample_ids`` of
        ``(batch,)``, int64. Documents are numbered in each block; what is left over is one more, with targets of -100.

    Cost: a microsecond or two for each document when it is made, and some 30 bytes of memory.
    """

    def __init__(self, path: Path, block_size: int) -> None:
        super().__init__(path, block_size)
        documents: NDArray[np.int64] = np.load(path.with_suffix(".documents.npy"))
        inputs = np.diff(documents) - 1  # the last token of a document has nothing to predict
        pieces = -(-inputs // block_size)
        before = np.repeat(np.cumsum(pieces) - pieces, pieces)
        offset = (np.arange(pieces.sum()) - before) * block_size
        starts = np.repeat(documents[:-1], pieces) + offset
        lengths = np.minimum(np.repeat(inputs, pieces) - offset, block_size)
        blocks = pack(lengths, block_size)
        order = np.array([piece for block in blocks for piece in block], dtype=np.int64)
        self._starts, self._lengths = starts[order], lengths[order]
        self._ends = np.cumsum([0, *map(len, blocks)])  # of the blocks, in pieces

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def filled(self) -> float:
        """Share of the room that text fills."""
        return float(self._lengths.sum() / (len(self) * self.block_size))

    def __getitems__(self, ids: Ids) -> Batch:
        size = self.block_size
        count = self._ends[ids + 1] - self._ends[ids]
        row = np.repeat(np.arange(len(ids)), count)
        number = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        piece = self._ends[ids][row] + number
        length = self._lengths[piece]
        before = np.cumsum(length) - length
        in_row = before - before[number == 0][row]
        within = np.arange(length.sum()) - np.repeat(before, length)
        to = np.repeat(row * size + in_row, length) + within
        of = np.repeat(self._starts[piece], length) + within
        input_ids = np.zeros(len(ids) * size, dtype=np.int64)
        targets = np.full(len(ids) * size, IGNORED)
        documents = np.repeat(count, size)
        input_ids[to], targets[to], documents[to] = self._tokens[of], self._tokens[of + 1], np.repeat(number, length)
        names = {"input_ids": input_ids, "targets": targets, "document_ids": documents}
        shaped = {name: torch.from_numpy(values.reshape(-1, size)) for name, values in names.items()}
        return shaped | {"sample_ids": torch.tensor(ids)}
