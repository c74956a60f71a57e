"""The base of every callback that looks and changes nothing."""

from abc import ABC, abstractmethod

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_callbacks import _ranks
from lit_callbacks._member import Member, publish


class Observer(Member, ABC):
    """Measures on every ``every_n_steps``-th optimizer step, and is switched off, not fatal, when that fails.

    An optimizer is measured at its first step at or after each multiple of ``every_n_steps``: with one optimizer when
    ``global_step % every_n_steps == 0``; with several, each gets its turn.
    """

    order = 0

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._before_start = -1
        self._last_period: dict[int, int] = {}
        self._failed = False

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> dict[str, Tensor]:
        """This rank's values, 0-d tensors under the same keys on every rank.

        No collectives here: a rank that raises would leave the others waiting.
        """

    def record(self, trainer: Trainer, pl_module: LightningModule, step: int, values: dict[str, float]) -> None:
        """Do something with the values, averaged over ranks: by default, log them."""
        publish(trainer, pl_module, step, values, summary=self.summary(values))

    def summary(self, values: dict[str, float]) -> list[str]:
        """The few keys that ModelCheckpoint and EarlyStopping may monitor."""
        return []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin counting, also in the middle of a resumed run."""
        self._before_start = (trainer.global_step - 1) // self.every_n_steps
        self._last_period = {}
        self._failed = False

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Due? Measure, agree that all ranks could, record."""
        step = trainer.global_step
        period = step // self.every_n_steps
        if period == self._last_period.get(id(optimizer), self._before_start) or self._failed:
            return
        self._last_period[id(optimizer)] = period

        values: dict[str, Tensor] = {}
        error = ""
        try:
            values = self.measure(trainer, pl_module, optimizer)
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception}"
        if self._any_rank_failed(trainer, error) or not values:
            return
        reduced = _ranks.mean(trainer, torch.stack([value.float() for value in values.values()]))
        self.record(trainer, pl_module, step, dict(zip(values, reduced.tolist(), strict=True)))

    def _any_rank_failed(self, trainer: Trainer, error: str) -> bool:
        if trainer.world_size > 1:
            flag = torch.tensor(float(bool(error)), device=trainer.strategy.root_device)
            self._failed = bool(_ranks.largest(trainer, flag))
        else:
            self._failed = bool(error)
        if self._failed:
            errors = _ranks.gather(trainer, error)
            rank = next(rank for rank, text in enumerate(errors) if text)
            rank_zero_warn(
                f"{type(self).__name__} is off for the rest of this fit, on all ranks: its measurement at step "
                f"{trainer.global_step} failed on rank {rank} with {errors[rank]}"
            )
        return self._failed
