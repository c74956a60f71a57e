"""The learning-rate range test: train a little at ever higher rates, and see where the loss falls (Smith 2017)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

_SMOOTHING = 0.9
_DIVERGED = 4.0  # times the lowest loss


@dataclass
class RangeCurve:
    """Learning rates, and the loss after a step of each.

    Args:
        rates: Of the group with the highest one, ascending.
        losses: As measured.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def smoothed(self) -> list[float]:
        """An exponential average with a memory of ten steps, without a bias at the start.

        Example:
            >>> RangeCurve([1e-3, 2e-3], [1.0, 2.0]).smoothed()
            [1.0, 1.5263157894736843]
        """
        average, weight, found = 0.0, 0.0, []
        for loss in self.losses:
            average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
            weight = _SMOOTHING * weight + (1 - _SMOOTHING)
            found.append(average / weight)
        return found

    def suggestion(self) -> float | None:
        """A learning rate to train at; None if the loss never falls."""
        return suggest(self.rates, self.smoothed())


def suggest(rates: Sequence[float], losses: Sequence[float]) -> float | None:
    """The middle, on a logarithmic scale, between the rate of the steepest fall and a tenth of that of the lowest loss.

    The first is what Lightning's and fastai's finders suggest, the second what people go by; in
    ``benchmarks/lr_sweep.py`` the first is too low for a run that long, and the second too high.

    Args:
        rates: Ascending, each the same factor above the one before.
        losses: Smoothed.

    Example:
        >>> round(suggest([0.1, 0.2, 0.4, 0.8, 1.6], [3.0, 2.8, 2.0, 1.9, 5.0]), 4)
        0.1265
    """
    if len(losses) < 3 or min(losses) > 0.99 * losses[0]:
        return None
    lowest = losses.index(min(losses))
    falls = [losses[i - 1] - losses[i + 1] for i in range(1, len(losses) - 1)]
    steepest = 1 + falls.index(max(falls))
    return math.sqrt(rates[steepest] * rates[lowest] / 10)


class RangeTest(Callback):
    """Multiply the learning rate at each step, keeping the ratios of the groups, until the loss has grown four times.

    The schedule does not count. Weights and optimizer are not put back: for a trainer of its own.

    Args:
        min_lr: The first one.
        max_lr: The last one.
        factor: From one to the next.

    Raises:
        ValueError: If they are not in order.
    """

    def __init__(self, min_lr: float = 1e-8, max_lr: float = 1.0, factor: float = 1.1) -> None:
        if not 0 < min_lr < max_lr:
            raise ValueError(f"min_lr must be above 0 and below max_lr, got {min_lr} and {max_lr}")
        if factor <= 1:
            raise ValueError(f"factor must be above 1, got {factor}")
        self.min_lr, self.max_lr, self.factor = min_lr, max_lr, factor
        self.curve = RangeCurve()
        self._losses: list[Tensor] = []
        self._ratios: list[float] = []

    @property
    def steps(self) -> int:
        """How many optimizer steps the test has."""
        return math.ceil(math.log(self.max_lr / self.min_lr) / math.log(self.factor)) + 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The groups' ratios."""
        rates = [float(g.get("initial_lr", g["lr"])) for o in trainer.optimizers for g in o.param_groups]
        self._ratios = [rate / max(rates) for rate in rates]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Set the rate of this step, whatever the schedule has set."""
        rate = self.min_lr * self.factor ** len(self.curve.rates)
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        for group, ratio in zip(groups, self._ratios, strict=True):
            group["lr"] = rate * ratio

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The loss of this step is what the rate of the one before has done."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self._losses.append(loss.detach())
        if trainer.fit_loop._should_accumulate():
            return
        value = float(torch.stack(self._losses).sum())  # each has been divided by their number
        self._losses = []
        if self.curve.rates:
            self.curve.losses.append(value)
        rate = self.min_lr * self.factor ** len(self.curve.rates)
        smoothed = self.curve.smoothed()
        if not math.isfinite(value) or rate > self.max_lr or (smoothed and smoothed[-1] > _DIVERGED * min(smoothed)):
            trainer.should_stop = True
            return
        self.curve.rates.append(rate)
