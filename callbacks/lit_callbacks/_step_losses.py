"""The loss of every optimizer step over micro-batches and ranks, for the price of one step in ten."""

from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_callbacks._facts import amp_scale, facts_of
from lit_callbacks._ranks import rows_of_ranks

TOGETHER = 10  # optimizer steps


class Means(NamedTuple):
    """Mean losses, on the device, ``(n,)``: each times its factor is that of the step; None for one to be left out."""

    steps: list[int | None]
    factors: list[int]
    values: Tensor


class StepLosses:
    """Keeps what the backward passes of up to ten steps have shown, and makes means of it in one go.

    Nothing is computed and nothing is read by the host until then: per step it costs the append to a list.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int | None, int, list[Tensor], Tensor | None]] = []
        self._last = -1

    def forget(self) -> None:
        """Begin anew."""
        self._kept, self._last = [], -1

    def keep(self, trainer: Trainer, step: int, left_out: bool) -> bool:
        """Take the losses of the step under way, once; whether it is time to make means."""
        if step == self._last:  # LBFGS asks again and again
            return False
        self._last = step
        losses = facts_of(trainer).shown(step)
        unknown = left_out or not losses  # of one whose backward pass Lightning has not made is none
        self._kept.append((None if unknown else step, trainer.accumulate_grad_batches, losses, amp_scale(trainer)))
        return len(self._kept) >= TOGETHER

    def means(self, trainer: Trainer) -> Means | None:
        """Of what is kept, which is then forgotten. All ranks must ask together: it is one small collective."""
        kept, self._kept = self._kept, []
        if not kept:
            return None
        steps, factors, shown, scales = zip(*kept, strict=True)
        device = trainer.strategy.root_device
        width = max(1, *map(len, shown))
        nothing, one = torch.zeros((), device=device), torch.ones((), device=device)
        rows = [x.reshape(()).to(device) for losses in shown for x in (*losses, *[nothing] * (width - len(losses)))]
        sums = torch.stack(rows).float().view(-1, width).sum(1)
        counts = torch.stack([x for losses in shown for x in [one] * len(losses) + [nothing] * (width - len(losses))])
        if scales[0] is not None:
            sums = sums / torch.stack(scales)
        both = torch.cat([sums, counts.view(-1, width).sum(1)])
        sums, counts = rows_of_ranks(trainer, both).sum(0).chunk(2)
        return Means([*steps], [*factors], sums / counts)
