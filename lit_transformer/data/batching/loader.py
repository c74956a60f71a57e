"""Batches of token blocks: an endless, resumable stream for training, fixed shards for evaluation."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_transformer.data.batching.order import Ids, SampleStream
from lit_transformer.errors import UsageError

Batch = dict[str, Tensor]


class Samples(Dataset[Batch], ABC):
    """Samples that are read a batch at a time.

    Args:
        name: What they are called in messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, ids: Ids) -> Batch: ...

    @abstractmethod
    def lengths(self) -> Ids:
        """Tokens of each of the sequences of a sample, ``(len(self), sequences)``."""

    def augment(self, batch: Batch, draws: Ids) -> Batch:
        """What is different each time a sample is drawn; in the process that trains.

        Args:
            batch: As read.
            draws: A number per sample, another one each time it is drawn for training, always the same in evaluation.
        """
        return batch


class Blocks(Samples):
    """A memory-mapped token array, cut into blocks that are read a batch at a time.

    Block ``i`` is ``tokens[i * block_size : (i + 1) * block_size]``; its targets are the same, one token later. The
    tokens after the last full block are not used.

    Args:
        path: A one-dimensional ``.npy`` file of token ids.
        block_size: Tokens in a block.

    Shapes:
        A batch is ``input_ids`` and ``targets`` of ``(batch, block_size)`` and ``sample_ids`` of ``(batch,)``, int64.
    """

    def __init__(self, path: Path, block_size: int) -> None:
        super().__init__(path.stem)
        self.path, self.block_size = path, block_size
        # A plain view: indexing the np.memmap subclass costs several microseconds more.
        self._tokens: NDArray[Any] = np.load(path, mmap_mode="r").view(np.ndarray)

    @cached_property
    def _windows(self) -> NDArray[Any]:
        return np.lib.stride_tricks.sliding_window_view(self._tokens, self.block_size + 1)[:: self.block_size]

    def __len__(self) -> int:
        return len(self._windows)

    def lengths(self) -> Ids:
        """All blocks are as long."""
        return np.broadcast_to(np.int64(self.block_size), (len(self), 1))

    @property
    def filled(self) -> float:
        """Share of the room that text fills."""
        return 1.0

    def counts(self, size: int) -> NDArray[np.int64]:
        """How often each of ``size`` token ids occurs."""
        return np.bincount(self._tokens, minlength=size)

    def __getitems__(self, ids: Ids) -> Batch:
        windows = self._windows[ids]
        return {
            "input_ids": torch.from_numpy(windows[:, :-1].astype(np.int64)),
            "targets": torch.from_numpy(windows[:, 1:].astype(np.int64)),
            "sample_ids": torch.tensor(ids),
        }

    def __reduce__(self) -> tuple[type["Blocks"], tuple[Path, int]]:
        return type(self), (self.path, self.block_size)  # a worker maps the file; pickling a memmap would copy it


def _as_is(batch: Batch) -> Batch:
    return batch


def _data_loader(samples: Samples, batches: Iterable[Ids], options: dict[str, Any]) -> DataLoader[Batch]:
    return DataLoader(
        samples,
        batch_sampler=batches,  # type: ignore[arg-type]  # ids come as arrays
        collate_fn=_as_is,  # type: ignore[arg-type]  # __getitems__ returns the batch, not a list
        generator=torch.Generator(),  # without one, every new iterator takes a number from the global generator
        **options,
    )


class _Draws:
    """The batch sampler of training: draws ahead of the consumer, and remembers where in the stream it drew."""

    def __init__(self, stream: SampleStream, size: int, rank: int, world_size: int) -> None:
        self.stream, self.size, self.rank, self.ranks = stream, size * world_size, rank, world_size
        self.count = 0
        self.indices: deque[Ids] = deque()

    def __iter__(self) -> Iterator[Ids]:
        self.indices.clear()
        for ids, indices in islice(self.stream.batches(self.size, self.ranks), self.count):
            self.indices.append(indices)
            yield self.share(ids)

    def share(self, batch: Ids) -> Ids:
        """What is this rank's of a global batch."""
        return batch[len(batch) * self.rank // self.ranks : len(batch) * (self.rank + 1) // self.ranks]


class TrainingLoader:
    """One epoch of training batches after another, from one endless stream.

    A global batch is what the stream gives for ``batch_size * world_size``; rank ``r`` takes the ``r``-th part of it.
    Iterating yields ``len(self)`` batches from wherever the stream stands at the first of them, and an abandoned
    iteration is continued by the next. A plain iterable, because Lightning re-creates a ``DataLoader`` with a sampler
    of its own.

    Args:
        samples: The training samples.
        stream: Order and position, shared with the data module.
        batch_size: Samples, or tokens if the stream counts these, in a batch of one rank.
        rank: Index of this process among those that see different data.
        world_size: How many such processes there are.
        **options: Passed to the inner ``DataLoader``: workers, prefetching, pinning.

    State: the stream's. A batch counts when it is handed out, not when a worker reads it. A jump of the stream (skip,
    exclude, load) takes effect at the next batch; what workers had prefetched is dropped.

    Cost: some 30 microseconds a batch without workers.
    """

    def __init__(
        self,
        samples: Samples,
        stream: SampleStream,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ) -> None:
        self.stream, self.dataset = stream, samples
        self._draws = _Draws(stream, batch_size, rank, world_size)
        self._inner = _data_loader(samples, self._draws, options)

    def __len__(self) -> int:
        return self.stream.batches_per_epoch(self._draws.size)

    def __iter__(self) -> Iterator[Batch]:
        left = len(self)
        while left:
            self._draws.count = left
            version = self.stream.version
            for batch in self._inner:
                indices = self._draws.indices.popleft()
                self.stream.position = int(indices[-1]) + 1
                left -= 1
                yield self.dataset.augment(batch, self._draws.share(indices))
                if self.stream.version != version:
                    break

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's state: with this, Lightning takes the loader for a resumable one."""
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the stream's state."""
        self.stream.load_state_dict(state)

    def close(self) -> None:
        """Stop persistent workers."""
        self._inner._iterator = None


class EvaluationLoader:
    """All samples of a split once, in order, shared out over the ranks.

    Rank ``r`` takes samples ``r, r + world_size, ...``: none twice, none left out. Every rank makes the same number of
    batches, of nearly equal size, because sharded models exchange weights in every forward pass.

    Args:
        samples: The samples of the split.
        batch_size: The most samples in a batch.
        rank: Index of this process among those that see different data.
        world_size: How many such processes there are.
        **options: Passed to the inner ``DataLoader``: workers, prefetching, pinning.

    Raises:
        UsageError: If there are fewer samples than ranks.
    """

    def __init__(self, samples: Samples, batch_size: int, rank: int = 0, world_size: int = 1, **options: Any) -> None:
        if len(samples) < world_size:
            raise UsageError(
                f"{samples.name} data of {len(samples)} samples cannot be shared over {world_size} processes: "
                "expected one for each. Give more text, lower block_size, or use fewer devices."
            )
        batches = -(-len(samples) // (batch_size * world_size))
        batches = min(batches, len(samples) // world_size)  # with one sample a batch, the odd ones join another batch
        self._batches = np.array_split(np.arange(rank, len(samples), world_size), batches)
        self._samples = samples
        self._inner = _data_loader(samples, self._batches, options)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._samples.augment, self._inner, self._batches)

    def close(self) -> None:
        """Stop persistent workers."""
        self._inner._iterator = None
