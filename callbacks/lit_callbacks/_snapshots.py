"""Snapshots of the training state in memory, copied in place into room that is made once."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_callbacks._probe_batch import ProbeBatch
from lit_callbacks._rng import rng_state, set_rng_state
from lit_callbacks._training_state import STATE, plain_values, restore

_ALIGNMENT = 64  # bytes


class Place(NamedTuple):
    """Where training is: the optimizer step, the epoch, and how far into the data."""

    step: int
    epoch: int
    data: int


class Snapshot:
    """One copy of what training changes. Taking it again overwrites it, and allocates only if a tensor is new.

    Args:
        allocate: Makes room for so many bytes.
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._saved: dict[str, Tensor] = {}
        self._values: dict[str, Any] = {}
        self._rng: dict[str, Any] = {}
        self.place = Place(-1, 0, 0)
        self.probe: ProbeBatch | None = None
        """The batch that came next."""

    @torch.no_grad()
    def take(self, trainer: Trainer, live: Mapping[str, Tensor], place: Place) -> None:
        """Copy everything as it is now; on a GPU the copy runs behind the training step, in the order of the stream."""
        if not _same_shapes(self._saved, live):
            self._saved = _views(self._allocate(size_of(live)), live)
        # By name: an optimizer may keep the same state in another order.
        torch._foreach_copy_([self._saved[name] for name in live], list(live.values()), non_blocking=True)
        self._values, self._rng = plain_values(trainer), rng_state(trainer.strategy.root_device)
        self.place, self.probe = place, None

    def fits(self, trainer: Trainer, live: Mapping[str, Tensor]) -> bool:
        """Whether it holds all that is trained: finetuning may have unfrozen more. Optimizer states may be new."""
        saved, now = ({name for name in names if not name.startswith(STATE)} for names in (self._saved, live))
        groups = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        return now <= saved and groups == [len(groups) for groups in self._values["groups"]]

    def restore(self, trainer: Trainer, module: LightningModule, rng: bool) -> None:
        """Copy everything back, so that the snapshot can be restored again; the random numbers only if asked for."""
        restore(trainer, module, self._saved, self._values)
        if rng:
            set_rng_state(self._rng, trainer.strategy.root_device)


class SnapshotRing:
    """The last few snapshots, oldest first.

    Args:
        keep: How many.
        allocate: Makes room for so many bytes.
    """

    def __init__(self, keep: int, allocate: Callable[[int], Tensor]) -> None:
        self._keep, self._allocate = keep, allocate
        self._spare: list[Snapshot] = []
        self.snapshots: list[Snapshot] = []

    def take(self, trainer: Trainer, live: Mapping[str, Tensor], place: Place) -> None:
        """Take one, in the room of the oldest if there are enough of them; none if there is no room at all."""
        if not self._keep:
            return
        if len(self.snapshots) >= self._keep:
            self._spare.append(self.snapshots.pop(0))
        snapshot = self._spare.pop() if self._spare else Snapshot(self._allocate)
        snapshot.take(trainer, live, place)
        self.snapshots.append(snapshot)

    def choose(self, before: int, further: int = 0) -> Snapshot | None:
        """The newest of step ``before`` or an earlier one, or the oldest if all are younger; or one further back."""
        old = [snapshot for snapshot in self.snapshots if snapshot.place.step <= before] or self.snapshots[:1]
        return old[max(0, len(old) - 1 - further)] if old else None

    def drop_unfit(self, trainer: Trainer, live: Mapping[str, Tensor]) -> None:
        """Give up those of another set of parameters."""
        self._spare += [snapshot for snapshot in self.snapshots if not snapshot.fits(trainer, live)]
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot not in self._spare]

    def drop_newest(self) -> None:
        """Give up the one that was taken last."""
        if self.snapshots:
            self._spare.append(self.snapshots.pop())

    def drop_younger(self, snapshot: Snapshot) -> None:
        """Give up those that were taken after it: they may hold the damage."""
        index = self.snapshots.index(snapshot)
        self._spare += self.snapshots[index + 1 :]
        del self.snapshots[index + 1 :]

    def forget_probes(self) -> None:
        """Give up the batches: what is normal for them is no longer."""
        for snapshot in self.snapshots:
            snapshot.probe = None


def host_room(pinned: bool) -> Callable[[int], Tensor]:
    """Makes room in memory; page-locked, a GPU writes to it without stopping."""
    return lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


def disk_room(folder: Path) -> Callable[[int], Tensor]:
    """Makes room in a file that is mapped into memory, and that is gone with the process."""

    def allocate(size: int) -> Tensor:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".snapshot-{os.getpid()}"
        with path.open("wb") as file:
            # A file with holes would kill the process when the disk is full.
            os.posix_fallocate(file.fileno(), 0, size)
        room = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        path.unlink()
        return room

    return allocate


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of room that a snapshot of them takes."""
    return sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values())


def _views(room: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    views, start = {}, 0
    for name, tensor in like.items():
        views[name] = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return views


def _same_shapes(saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> bool:
    if saved.keys() != live.keys():
        return False
    return all(saved[name].shape == tensor.shape and saved[name].dtype == tensor.dtype for name, tensor in live.items())
