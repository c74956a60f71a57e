"""The base of every callback that looks and changes nothing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_callbacks import _ranks
from lit_callbacks._cadence import Cadence
from lit_callbacks._events import EventLog, run_folder
from lit_callbacks._member import Member, publish
from lit_callbacks._ranks import Measurement

T = TypeVar("T")


class Observer(Member, ABC):
    """Measures every ``every_n_steps`` optimizer steps, and is switched off, not fatal, when that fails on any rank.

    A subclass measures in its hooks, under :meth:`attempt`, and then calls :meth:`report` on every rank.
    """

    order = 0

    def __init__(self, every_n_steps: int) -> None:
        self.cadence = Cadence(every_n_steps)
        self.every_n_steps = every_n_steps
        self.events = EventLog()
        self.off = False
        self._error = ""

    @abstractmethod
    def summarise(self, total: Measurement) -> dict[str, Tensor]:
        """The values to record, 0-d tensors by metric key, from what all ranks measured together."""

    def record(self, trainer: Trainer, pl_module: LightningModule, step: int, values: dict[str, float]) -> None:
        """Do something with the values, which all ranks share: by default, log them."""
        publish(trainer, pl_module, step, values, summary=self.summary(values))

    def summary(self, values: Mapping[str, float]) -> list[str]:
        """The few keys that ModelCheckpoint and EarlyStopping may monitor."""
        return []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A new fit is a new chance; find the run folder while all ranks are here."""
        super().setup(trainer, pl_module, stage)
        self.off, self._error = False, ""
        self.events = EventLog(run_folder(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin counting, also in the middle of a resumed run."""
        self.cadence.start(trainer.global_step)

    def attempt(self, function: Callable[..., T], *args: Any) -> T | None:
        """Call a part of the measurement; an error is kept until all ranks can agree that it is over."""
        if self.off or self._error:
            return None
        try:
            return function(*args)
        except Exception as exception:
            self._error = f"{type(exception).__name__}: {exception}"
            return None

    def report(
        self, trainer: Trainer, pl_module: LightningModule, step: int, measure: Callable[[], Measurement | None]
    ) -> None:
        """Agree that all ranks could measure, combine, and record. All ranks must call this together."""
        if self.off:
            return
        measurement = self.attempt(measure) or Measurement()
        failed, differ = _ranks.any_failed(trainer, bool(self._error), measurement)
        if failed:
            self._switch_off(trainer, step)
            return
        total = _ranks.combine(trainer, measurement, differ)
        self.attempt(lambda: self.read(trainer, pl_module, step, self.summarise(total)))
        if self._error and trainer.world_size == 1:  # with more ranks, they agree on it at the next report
            self._switch_off(trainer, step)

    def read(self, trainer: Trainer, pl_module: LightningModule, step: int, values: dict[str, Tensor]) -> None:
        """Bring the values to the host, in one transfer, and record them."""
        if values:
            read = torch.stack([value.float() for value in values.values()]).tolist()
            self.record(trainer, pl_module, step, dict(zip(values, read, strict=True)))

    def _switch_off(self, trainer: Trainer, step: int) -> None:
        self.off = True
        errors = _ranks.gather(trainer, self._error)
        rank = next(rank for rank, error in enumerate(errors) if error)
        rank_zero_warn(
            f"{type(self).__name__} is off for the rest of this run, on all ranks: its measurement at step {step} "
            f"failed on rank {rank} with {errors[rank]}"
        )
