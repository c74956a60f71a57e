"""Rows of token ids of different lengths, in one array."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_transformer.data.batching.order import Ids


class Ragged:
    """Token ids of texts.

    Args:
        rows: The ids of each text.

    Example:
        >>> ids, mask = Ragged([[5, 6, 7], [8]]).pad(np.array([0, 1]), value=0)
        >>> ids.tolist(), mask.tolist()
        ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    """

    def __init__(self, rows: Sequence[Sequence[int] | NDArray[Any]]) -> None:
        self._ends = np.cumsum([0, *map(len, rows)])
        self._tokens: NDArray[Any] = np.concatenate([np.array(ids, dtype=np.uint32) for ids in rows])

    @classmethod
    def of(cls, tokens: NDArray[Any], ends: NDArray[np.int64]) -> "Ragged":
        """Rows in an array that is there: row ``i`` is ``tokens[ends[i] : ends[i + 1]]``."""
        rows = cls.__new__(cls)
        rows._tokens, rows._ends = tokens, ends
        return rows

    def take(self, places: Ids) -> "Ragged":
        """Some of the rows; the same array, if that is all of them."""
        return self if len(places) == len(self) else Ragged([self[i] for i in places])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> NDArray[Any]:
        return self._tokens[self._ends[i] : self._ends[i + 1]]

    def lengths(self) -> NDArray[np.int64]:
        """How long each row is."""
        return np.diff(self._ends)

    def pad(self, places: Ids, value: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Some rows, filled up with a value to the longest of them, and 1 where they are themselves.

        Returns:
            Two arrays of ``(len(places), longest)``, int64.
        """
        rows = [self[i] for i in places]
        ids = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return ids, mask

    def counts(self, size: int, places: Ids | None = None) -> NDArray[np.int64]:
        """How often each of ``size`` token ids occurs, in some rows or in all."""
        tokens = self._tokens if places is None else np.concatenate([self[i] for i in places])
        return np.bincount(tokens, minlength=size)

    def digest(self) -> str:
        """SHA-256 of the ids and of where rows end."""
        return hashlib.sha256(self._tokens.tobytes() + self._ends.tobytes()).hexdigest()
