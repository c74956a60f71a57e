"""Batches of samples of like length, so that little is padded: a pure function of (seed, place), too."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lit_transformer.data.batching.order import Ids, SampleStream, noise, order
from lit_transformer.errors import UsageError

_BATCHES = 50  # in a mega-batch; as in Hugging Face's LengthGroupedSampler


class GroupedStream(SampleStream):
    """Likewise endless, but samples that are about as long come together.

    The order of an epoch is cut into mega-batches of some fifty batches. Each of these is cut into batches by length,
    whose order is drawn. A place is one in the order that this makes, and a batch ends where its last sample
    does: what is excluded makes a batch smaller, and no batch holds samples of two. Every epoch has every sample once.

    Args:
        seed: Seed of the order.
        by_tokens: A size is one in tokens, padding counted, not in samples.

    State: as :class:`~lit_transformer.data.batching.order.SampleStream`, for batches of one size.

    Cost: the lengths in memory, and some microseconds a sample, spent once a mega-batch.

    Example:
        >>> from itertools import islice
        >>> stream = GroupedStream(seed=0)
        >>> stream.over(np.array([[3], [9], [3], [9]]))
        >>> [stream.lengths[ids].ravel().tolist() for ids, _ in islice(stream.batches(2), 2)]
        [[9, 9], [3, 3]]
    """

    def __init__(self, seed: int, by_tokens: bool = False) -> None:
        super().__init__(seed)
        self.by_tokens = by_tokens
        self.lengths: Ids = np.empty((0, 1), dtype=np.int64)

    def over(self, lengths: Ids) -> None:
        """Say how long each sample is.

        Args:
            lengths: ``(n, k)`` tokens of each of the ``k`` sequences of a sample, each padded for itself.
        """
        self.n, self.lengths = len(lengths), lengths

    def batches(self, size: int, ranks: int = 1) -> Iterator[tuple[Ids, Ids]]:
        """Yield batches of ids from the present place on, and the place of each. Moves nothing.

        Raises:
            UsageError: If no batch has a sample for every rank.
        """
        begin = self.position
        epoch, offset = divmod(begin, self.n)
        while True:
            found = False
            for places, ids in self._epoch(epoch, offset, size):
                kept = (places >= begin) & ~np.isin(ids, self.excluded)
                if kept.sum() >= ranks:
                    found = True
                    yield ids[kept], places[kept]
            if offset == 0 and not found:
                raise UsageError(f"no batch of {self.n} samples has one for each of {ranks} processes")
            epoch, offset = epoch + 1, 0

    def batches_per_epoch(self, size: int) -> int:
        """Return how many batches the first epoch has."""
        return sum(1 for _ in self._epoch(0, 0, size)) if self.by_tokens else -(-self.n // size)

    def describe(self, size: int) -> str:
        """What a place depends on, beside the seed and the samples."""
        return f"{size} {'tokens' if self.by_tokens else 'samples'} of like length"

    def _epoch(self, epoch: int, offset: int, size: int) -> Iterator[tuple[Ids, Ids]]:
        """Places and ids of the batches of an epoch, from the mega-batch on that an offset is in."""
        mega = _BATCHES * size
        if self.by_tokens:
            mega = max(1, round(mega / self.lengths.sum(1).mean()))
        for start in range(offset // mega * mega, self.n, mega):
            ids = order(self.seed, epoch, self.n, np.arange(start, min(start + mega, self.n)))
            batches = self._cut(ids, size)
            place = epoch * self.n + start
            drawn = noise(self.seed, np.array([place]), len(batches))[0]
            for i in np.argsort(drawn):
                yield place + np.arange(len(batches[i])), batches[i]
                place += len(batches[i])

    def _cut(self, ids: Ids, size: int) -> list[Ids]:
        """The batches of a mega-batch."""
        if not self.by_tokens:
            return list(self._alike(ids, -(-len(ids) // size)))
        ids = np.concatenate(list(self._alike(ids, -(-int(self.lengths[ids].sum()) // size))))
        cuts, start, longest = [], 0, [0] * self.lengths.shape[1]
        for i, length in enumerate(self.lengths[ids].tolist()):
            longest = list(map(max, longest, length))
            if (i + 1 - start) * sum(longest) > size and i > start:
                cuts.append(i)
                start, longest = i, length
        return np.split(ids, cuts)

    def _alike(self, ids: Ids, parts: int) -> Iterator[Ids]:
        """As many parts of nearly equal size: halved, and halved again, by the sequence that is padded most.

        Where a sample is one sequence, this sorts; where it is two, neither a sum nor one of both brings those together
        that are alike in both.
        """
        lengths = self.lengths[ids]
        ids = ids[np.argsort(lengths[:, (lengths.max(0) - lengths.mean(0)).argmax()], kind="stable")]
        if parts == 1:
            yield ids
        else:
            left = parts // 2
            middle = len(ids) * left // parts
            yield from self._alike(ids[:middle], left)
            yield from self._alike(ids[middle:], parts - left)


def padding(lengths: Ids, batches: Iterator[NDArray[np.int64]]) -> float:
    """The share of padded tokens in some batches.

    Example:
        >>> padding(np.array([[2], [4]]), iter([np.array([0, 1])]))
        0.25
    """
    used = padded = 0
    for ids in batches:
        used += int(lengths[ids].sum())
        padded += len(ids) * int(lengths[ids].max(0).sum())
    return 1 - used / padded
