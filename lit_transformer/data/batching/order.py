"""The order of training samples, a pure function of (seed, epoch, index), and the place in it."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_transformer.errors import UsageError

Ids = NDArray[np.int64]

_ROUNDS = 16  # fewer leave a bias that shows for a handful of samples
_GAMMA = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, the increment of SplitMix64


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits, one to one (the finaliser of SplitMix64; Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffle(x: NDArray[np.uint64], key: NDArray[np.uint64], rows: int, columns: int) -> NDArray[np.uint64]:
    """Permute ``range(rows * columns)`` by a Feistel network over (row, column)."""
    row, column = x // columns, x % columns
    for _ in range(_ROUNDS):
        key = key + np.uint64(_GAMMA)
        row, column = column, (row + _mix(column + key) % rows) % rows
        rows, columns = columns, rows
    return row * columns + column


def noise(seed: int, draws: Ids, length: int) -> NDArray[np.uint64]:
    """Random 64 bits for each of ``length`` places in each of some draws: a pure function of all three.

    Returns:
        An array of ``(len(draws), length)``.

    Example:
        >>> bool((noise(0, np.array([3, 4]), 8)[1] == noise(0, np.array([4]), 8)[0]).all())
        True
    """
    key = _mix(_mix(np.array([seed], dtype=np.uint64)) + draws.astype(np.uint64))
    return _mix(key[:, None] + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_GAMMA))


def order(seed: int, epoch: int | Ids, n: int, indices: Ids) -> Ids:
    """Return the samples at some places of one epoch's order.

    For every (seed, epoch) this is a permutation of ``range(n)`` that needs no memory: a generalised Feistel network
    over a grid barely larger than ``n``, walked on until it lands inside (Black and Rogaway, CT-RSA 2002, *Ciphers
    with Arbitrary Finite Domains*). It is for shuffling, not for secrets.

    Args:
        seed: Chooses the family of orders.
        epoch: Chooses the order; one number, or one per index.
        n: How many samples there are.
        indices: Places in the order, each in ``range(n)``.

    Returns:
        The sample ids, as long as ``indices``.

    Example:
        >>> sorted(order(seed=0, epoch=3, n=5, indices=np.arange(5)).tolist())
        [0, 1, 2, 3, 4]
    """
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    x = np.array(indices, dtype=np.uint64)
    key = _mix(_mix(np.full(x.shape, seed, dtype=np.uint64)) + np.asarray(epoch, dtype=np.uint64))
    x = _shuffle(x, key, rows, columns)
    while (outside := x >= n).any():
        x[outside] = _shuffle(x[outside], key[outside], rows, columns)
    return x.astype(np.int64)


class SampleStream:
    """An endless stream of sample ids, one epoch's order after another.

    Stream index ``g`` is place ``g % n`` of epoch ``g // n``. The position is the number of stream indices passed over
    by all ranks together, so it means the same for any batch size and any number of ranks.

    Args:
        seed: Seed of the order.
        n: How many samples there are; 0 until known.

    State: ``position`` and the excluded ids. ``version`` changes with every jump, so that whoever has drawn ahead
    notices.

    Example:
        >>> stream = SampleStream(seed=0, n=4)
        >>> ids, indices = next(stream.batches(3))
        >>> len(ids), indices.tolist()
        (3, [0, 1, 2])
    """

    _CHUNK = 4096  # indices drawn at once: numpy's cost per call is then spread over many batches

    def __init__(self, seed: int, n: int = 0) -> None:
        self.seed, self.n = seed, n
        self.position = 0
        self.excluded: Ids = np.empty(0, dtype=np.int64)
        self.version = 0

    def over(self, lengths: Ids) -> None:
        """Say how many samples there are: as many as lengths."""
        self.n = len(lengths)

    def describe(self, size: int) -> str:
        """What a place depends on, beside the seed and the samples."""
        return "random"

    def batches(self, size: int, ranks: int = 1) -> Iterator[tuple[Ids, Ids]]:
        """Yield batches of ids from the present position on, and the stream index of each. Moves nothing."""
        start = self.position
        ids = indices = np.empty(0, dtype=np.int64)
        while True:
            index = np.arange(start, start + self._CHUNK)
            start += self._CHUNK
            drawn = order(self.seed, index // self.n, self.n, index % self.n)
            kept = ~np.isin(drawn, self.excluded)
            ids, indices = np.concatenate([ids, drawn[kept]]), np.concatenate([indices, index[kept]])
            full = len(ids) // size * size
            for i in range(0, full, size):
                yield ids[i : i + size], indices[i : i + size]
            ids, indices = ids[full:], indices[full:]

    def batches_per_epoch(self, size: int) -> int:
        """Return how many batches of a size fit into one epoch, one at least."""
        return max(1, self.n // size)

    def skip(self, n: int) -> None:
        """Pass over the next ``n`` stream indices."""
        if n < 0:
            raise UsageError(f"skip(n) goes forward only: expected n >= 0, got {n}")
        self.position += n
        self.version += 1

    def exclude(self, ids: Iterable[int]) -> None:
        """Never draw these samples again."""
        excluded = np.union1d(self.excluded, np.fromiter(ids, dtype=np.int64))
        if len(excluded) and (excluded[0] < 0 or excluded[-1] >= self.n):
            raise UsageError(f"sample ids are in 0..{self.n - 1}, got {excluded[0]}..{excluded[-1]}")
        if len(excluded) == self.n:
            raise UsageError(f"all {self.n} training samples would be excluded, and none left to train on")
        self.excluded = excluded
        self.version += 1

    def state_dict(self) -> dict[str, Any]:
        """Return position and excluded ids as plain types."""
        return {"position": self.position, "excluded": self.excluded.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position, with its excluded ids."""
        self.position = int(state["position"])
        self.excluded = np.array(state["excluded"], dtype=np.int64)
        self.version += 1
