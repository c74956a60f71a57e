"""The loss of every optimizer step over micro-batches and ranks, for the price of one step in ten."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_callbacks._facts import amp_scale, facts_of, has_scaler
from lit_callbacks._ranks import rows_of_ranks

TOGETHER = 10  # optimizer steps


class Means(NamedTuple):
    """Mean losses, on the device, ``(n,)``: each times its factor is that of the step; None for one to be left out."""

    steps: list[int | None]
    factors: list[float]
    values: Tensor


class StepLosses:
    """Keeps what the backward passes of up to ten steps have shown, and makes means of it in one go.

    Nothing is computed and nothing is read by the host until then: per step it costs the append to a list.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int | None, list[Tensor]]] = []
        self._factors: list[float] = []
        self._scales: list[Tensor] = []
        self._last = -1
        self._scaled: bool | None = None

    def keep(self, trainer: Trainer, step: int, left_out: bool) -> bool:
        """Take the losses of the step under way, once; whether it is time to make means."""
        if step == self._last:  # LBFGS asks again and again
            return False
        self._last = step
        losses = facts_of(trainer).shown(step)
        self._kept.append((None if left_out or not losses else step, losses))  # of an unknown backward pass is none
        self._factors.append(trainer.accumulate_grad_batches)
        if self._scaled is None:
            self._scaled = has_scaler(trainer)
        if self._scaled and (scale := amp_scale(trainer)) is not None:  # which changes from step to step
            self._scales.append(scale)
        return len(self._kept) >= TOGETHER

    def means(self, trainer: Trainer) -> Means | None:
        """Of what is kept, which is then forgotten. All ranks must ask together: it is one small collective."""
        if not self._kept:
            return None
        steps, shown = [step for step, _ in self._kept], [losses for _, losses in self._kept]
        factors, scales = self._factors, self._scales
        self._kept, self._factors, self._scales = [], [], []
        device = trainer.strategy.root_device
        sums = _sums(shown, torch.zeros((), device=device))
        if scales:
            sums = sums / torch.stack(scales)
        if trainer.world_size == 1:
            return Means(steps, [by / max(1, len(losses)) for by, losses in zip(factors, shown, strict=True)], sums)
        one = torch.ones((), device=device)
        counts = _sums([[one] * len(losses) for losses in shown], torch.zeros((), device=device))
        sums, counts = rows_of_ranks(trainer, torch.cat([sums, counts])).sum(0).chunk(2)
        return Means(steps, factors, sums / counts)


def _sums(rows: Sequence[Sequence[Tensor]], nothing: Tensor) -> Tensor:
    """Of rows of scalars, which may differ in length, fp32, ``(n,)``."""
    width = max(1, *map(len, rows))
    flat = [x if x.dim() == 0 else x.reshape(()) for row in rows for x in (*row, *[nothing] * (width - len(row)))]
    sums = torch.stack(flat).float()
    return sums if width == 1 else sums.view(-1, width).sum(1)
