"""What there is to go back to, and whether one should."""

import math
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_callbacks._data_jump import data_place
from lit_callbacks._facts import facts_of
from lit_callbacks._probe_batch import any_non_finite, remember, rise
from lit_callbacks._room import find_room
from lit_callbacks._snapshots import Place, Snapshot, SnapshotRing, size_of
from lit_callbacks._training_state import live_tensors
from lit_callbacks._window import Window

_SHARE_OF_EXCESS = 0.5  # a fault of the data costs a batch from before nothing, damaged weights cost it all of that


class Rewinder:
    """Snapshots of one fit, each with the batch that came next.

    Args:
        every: Optimizer steps between snapshots.
        keep: Snapshots to keep, where there is room.
        folder: The run's folder, for what does not fit into memory.
    """

    def __init__(self, every: int, keep: int, folder: Path) -> None:
        self.every, self.keep, self.folder = every, keep, folder
        self._ring: SnapshotRing | None = None
        self._next = 1  # an optimizer has its state after the first step
        self._untouched = False
        self._unread: Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether it is time for a snapshot."""
        return step >= self._next

    def take(self, trainer: Trainer, module: LightningModule) -> None:
        """Take a snapshot before the first forward pass of a step."""
        live = live_tensors(trainer, module)
        if self._ring is None:
            room = find_room(trainer, size_of(live), self.keep, self.folder)
            (rank_zero_warn if room.is_less else rank_zero_info)(f"LossSpikeRecovery: {room.statement}.")
            self._ring = SnapshotRing(room.keep, room.allocate)
        self._next = trainer.global_step + self.every
        self._ring.drop_unfit(trainer, live)
        self._ring.take(trainer, live, Place(trainer.global_step, trainer.current_epoch, data_place(trainer)))
        self._unread, self._untouched = any_non_finite(trainer, live), True

    def is_finite(self) -> bool:
        """Whether the snapshot that was taken last is, if nobody has asked yet; one that is not is given up.

        To be asked when the host has read the step's loss: what came before that has been computed by then.
        """
        unread, self._unread = self._unread, None
        if unread is None or not unread.item():
            return True
        if self._ring is not None:
            self._ring.drop_newest()
        return False

    def step_follows(self, trainer: Trainer, window: Window) -> None:
        """Keep the window's first batch with the snapshot, if the weights are still its own."""
        if self._untouched and self._ring is not None and self._ring.snapshots:
            loss = facts_of(trainer).losses(trainer)[0]
            self._ring.snapshots[-1].probe = remember(window.micro_batches[0], loss)
        self._untouched = False

    def are_weights_healthy(self, trainer: Trainer, module: LightningModule, excess: float, before: int) -> bool | None:
        """Whether they cost the batch of a snapshot less than half of ``excess`` nats; None if that cannot be told."""
        if not self._all_finite(trainer, module):
            return False
        snapshot = self._choose(trainer, module, before)
        if snapshot is None:
            return True  # nothing better is known
        change = rise(trainer, module, snapshot.probe)
        if change is None:
            return None
        return math.isfinite(change) and change <= _SHARE_OF_EXCESS * excess

    def go_back(self, trainer: Trainer, module: LightningModule, before: int, further: int) -> Place | None:
        """Restore a snapshot, and give up the younger ones; None if there is none, or it does not help.

        It does not where the damage is in frozen parameters, which snapshots leave out.
        """
        snapshot = self._choose(trainer, module, before, further)
        if snapshot is None or self._ring is None:
            return None
        # Across an epoch's end, a loader would draw its next order from the same random numbers again.
        snapshot.restore(trainer, module, rng=snapshot.place.epoch == trainer.current_epoch)
        self._ring.drop_younger(snapshot)
        self._next, self._untouched = trainer.global_step + self.every, False
        return snapshot.place if self._all_finite(trainer, module) else None

    def _choose(self, trainer: Trainer, module: LightningModule, before: int, further: int = 0) -> Snapshot | None:
        if self._ring is None:
            return None
        self._ring.drop_unfit(trainer, live_tensors(trainer, module))
        return self._ring.choose(before, further)

    def _all_finite(self, trainer: Trainer, module: LightningModule) -> bool:
        frozen = {f"frozen {name}": p.detach() for name, p in module.named_parameters() if not p.requires_grad}
        return not any_non_finite(trainer, live_tensors(trainer, module) | frozen).item()

    def forget_batches(self) -> None:
        """The data has changed: what a batch from before costs means nothing any more."""
        if self._ring is not None:
            self._ring.forget_probes()
