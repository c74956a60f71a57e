"""What there is to go back to, and whether one should."""

import math
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

from lit_callbacks._data_jump import data_place, draws_here
from lit_callbacks._facts import facts_of
from lit_callbacks._probe_batch import ProbeBatch, any_non_finite, copy_of, rise
from lit_callbacks._room import find_room
from lit_callbacks._shards import local
from lit_callbacks._snapshots import Place, Snapshot, SnapshotRing, size_of
from lit_callbacks._training_state import live_tensors
from lit_callbacks._window import MicroBatch, Window
from lit_callbacks.functional import tensor_norms

_LOOKS = 3  # snapshots at which frozen parameters are looked at
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
        self.culprit: str | None = None
        """What was found damaged that no snapshot holds."""
        self._ring: SnapshotRing | None = None
        self._next = 1  # an optimizer has its state after the first step
        self._trained: list[int] = []
        self._frozen: dict[str, float] = {}
        self._moving: set[str] = set()
        self._never_finite: set[str] = set()
        self._looks = 0
        self._untouched = False
        self._probe: MicroBatch | None = None
        self._unread: Tensor | None = None

    def start(self, module: LightningModule) -> None:
        """Look at what is not trained: masks and trackers may be infinite by intention."""
        buffers = ((name, b) for name, b in module.named_buffers() if b.is_floating_point() and not is_lazy(b))
        norms = _norms(dict(buffers) | _frozen(module))
        self._never_finite = {name for name, norm in norms.items() if not math.isfinite(norm)}
        self._frozen = _norms(_frozen(module))

    @property
    def has_any(self) -> bool:
        """Whether there is something to go back to."""
        return self._ring is not None and bool(self._ring.snapshots)

    def due(self, trainer: Trainer, module: LightningModule) -> bool:
        """Whether it is time for a snapshot; also as soon as other parameters are trained."""
        if trainer.global_step < 1:
            return False
        before, self._trained = self._trained, _trained(trainer, module)
        return trainer.global_step >= self._next or before != self._trained

    def take(self, trainer: Trainer, module: LightningModule) -> None:
        """Take a snapshot before the first forward pass of a step."""
        if self._looks < _LOOKS:  # a teacher follows its student without gradients
            self._looks += 1
            now = _norms(_frozen(module))
            self._moving |= {name for name, norm in now.items() if norm != self._frozen.get(name, norm)}
        live = live_tensors(trainer, module, self._moving)
        if self._ring is None:
            room = find_room(trainer, size_of(live), self.keep, self.folder)
            (rank_zero_warn if room.is_less else rank_zero_info)(f"LossSpikeRecovery: {room.statement}.")
            self._ring = SnapshotRing(room.keep, room.allocate)
        self._next = trainer.global_step + self.every
        self._ring.drop_unfit(trainer, live)
        self._ring.take(trainer, live, Place(trainer.global_step, trainer.current_epoch, data_place(trainer)))
        self._unread, self._untouched = any_non_finite(trainer, self._judged(live)), True

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

    def batch_follows(self, window: Window) -> None:
        """Copy the first batch of a window while no forward pass has changed it, if a snapshot was taken before it."""
        self._probe = copy_of(window.current) if self._untouched and window.current is not None else None

    def step_follows(self, trainer: Trainer) -> None:
        """Keep the window's first batch with the snapshot, if the weights are still its own."""
        if self._untouched and self._probe is not None and self._ring is not None and self._ring.snapshots:
            self._ring.snapshots[-1].probe = ProbeBatch(self._probe, facts_of(trainer).losses(trainer)[0].clone())
        self._untouched, self._probe = False, None

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
        # Across an epoch's end, or from a loader that draws its data here, the same random numbers are the same data.
        rng = snapshot.place.epoch == trainer.current_epoch and not draws_here(trainer)
        snapshot.restore(trainer, module, rng)
        self._ring.drop_younger(snapshot)
        self._next, self._untouched = trainer.global_step + self.every, False
        if self._all_finite(trainer, module):
            return snapshot.place
        tensors = live_tensors(trainer, module) | _frozen(module)
        norms = _norms({name: t for name, t in self._judged(tensors).items() if t.is_floating_point()})
        self.culprit = next((name for name, norm in norms.items() if not math.isfinite(norm)), None)
        return None

    def _choose(self, trainer: Trainer, module: LightningModule, before: int, further: int = 0) -> Snapshot | None:
        if self._ring is None:
            return None
        self._ring.drop_unfit(trainer, live_tensors(trainer, module, self._moving))
        return self._ring.choose(before, further)

    def _all_finite(self, trainer: Trainer, module: LightningModule) -> bool:
        return not any_non_finite(trainer, self._judged(live_tensors(trainer, module) | _frozen(module))).item()

    def _judged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name not in self._never_finite}

    def forget_batches(self) -> None:
        """The data has changed: what a batch from before costs means nothing any more."""
        if self._ring is not None:
            self._ring.forget_probes()


def _frozen(module: LightningModule) -> dict[str, Tensor]:
    named = ((name, p) for name, p in module.named_parameters() if not p.requires_grad and p.is_floating_point())
    return {name: local(p.detach()) for name, p in named if p.element_size() > 1}  # no norm of fp8


def _norms(tensors: dict[str, Tensor]) -> dict[str, float]:
    return dict(zip(tensors, tensor_norms(list(tensors.values())).tolist(), strict=True))


def _trained(trainer: Trainer, module: LightningModule) -> list[int]:
    groups = [len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [sum(parameter.requires_grad for parameter in module.parameters()), *groups]
