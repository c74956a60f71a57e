"""Which layer made the NaN?"""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lit_callbacks import _ranks
from lit_callbacks._events import say
from lit_callbacks._facts import facts_of, has_scaler
from lit_callbacks._first_non_finite import FINITE, Finding, Search
from lit_callbacks._replay import training_loss, without_trace
from lit_callbacks._window import MicroBatch
from lit_callbacks._window_actor import WindowActor


class NonFiniteAutopsy(WindowActor):
    """Name the module in which the first NaN or infinity of a bad step arose.

    A step whose loss or gradient is not finite is run a second time before anything is done about it: with the same
    batches, buffers and random numbers, and with hooks on every module and on every operation of the backward pass.
    The finding goes into ``events.jsonl`` in the run folder and onto the console. It is the first of these:

    - ``parameter``: a weight was bad before the step.
    - ``batch``: the batch was, under this key or at this position.
    - ``forward``: the first module whose output was, with the ranges of its input, weights and output. What a module
      computes between the calls of its children is its own.
    - ``loss``: the loss was, though all outputs were finite.
    - ``backward``: the first operation that made a bad gradient of a good one, the module it belongs to, and the first
      parameter that got a bad one.
    - ``failed``: the step could not be repeated, and why. That does not end the run.
    - ``finite``: nothing was bad the second time, which points at the hardware or at what is left to chance.

    Minus infinity alone counts as a mask, and is only mentioned. Nothing is changed: what becomes of the step is for
    :class:`LossSpikeRecovery` to say, which comes after. All ranks repeat the step, and the earliest finding is
    reported. An infinite *gradient* under a GradScaler is how the scaler searches for its factor, and is left to it.
    Compiled modules run eagerly when repeated; through reentrant activation checkpoints the backward pass is not
    followed.

    Logs: nothing; what was found goes into ``events.jsonl``.

    Args:
        max_reports: Bad steps to look into in a run; later ones are seldom news.

    Raises:
        ValueError: If ``max_reports`` is below 1; at setup in manual optimization or under a strategy that shards
            gradients.

    State: the number of reports so far.

    Cost: the gradient norm and one read by the host on every step; at every batch's start a copy of the generators'
    states (20 microseconds), and at every window's of the buffers, if the model has any. The batches of a window are
    kept until the next. A report takes many times as long as its step, and memory for the gradients once more.

    Example:
        >>> NonFiniteAutopsy(max_reports=2).max_reports
        2
    """

    order = 1

    def __init__(self, max_reports: int = 5) -> None:
        if max_reports < 1:
            raise ValueError(f"max_reports must be at least 1, got {max_reports}")
        super().__init__()
        self.max_reports = max_reports
        self._reports = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Agree on whether this step is finite; if it is not, find out why and say so."""
        reading = facts_of(trainer).reading(trainer, optimizer)
        if reading.finite and (math.isfinite(reading.grad_norm) or has_scaler(trainer)):
            return
        if self._reports >= self.max_reports:
            return
        self._reports += 1
        finding, rank, batch_idx = self._repeat(trainer, pl_module)
        rank = reading.first_bad_rank if rank is None else rank
        event = {
            "step": trainer.global_step,
            "event": "autopsy",
            "phase": finding.phase,
            "where": finding.where or None,
            "rank": rank,
            "batch_idx": batch_idx,
            "parameter": finding.parameter,
            "ranges": {name: values._asdict() for name, values in finding.ranges.items()} or None,
            "text": str(finding),
        }
        self.events.write(**event)
        on_rank = f" on rank {rank}" if trainer.world_size > 1 and rank is not None else ""
        say(f"step {trainer.global_step}{on_rank}: {finding}")

    def _repeat(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Finding, int | None, int | None]:
        """The earliest finding in the first bad micro-batch of all ranks, its rank, and the batch's index."""
        found: tuple[Finding, int | None, int | None] = FINITE, None, None
        with without_trace(trainer, pl_module), torch.enable_grad():
            self.window.rewind()
            for micro_batch in self.window.micro_batches:
                # All ranks go through forward and backward whatever they see: models may have collectives of their own.
                findings = _ranks.gather(trainer, _look(trainer, pl_module, micro_batch))
                first = min(findings, key=lambda finding: finding.time)
                if first.time < found[0].time:
                    found = first, findings.index(first), micro_batch.batch_idx
                if not first.nothing:
                    break
        return found

    def state_dict(self) -> dict[str, Any]:
        """The number of reports."""
        return {"reports": self._reports}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._reports = state_dict["reports"]


def _look(trainer: Trainer, pl_module: LightningModule, micro_batch: MicroBatch) -> Finding:
    search = Search(pl_module)
    try:
        with search.forward():
            loss = training_loss(trainer, pl_module, micro_batch)
        search.backward(loss)
        return search.finding(micro_batch.batch, loss)
    except Exception as error:
        first_line, *_ = str(error).split("\n")
        text = f"the step could not be repeated: {search.running} raised {type(error).__name__}: {first_line}"
        return Finding("failed", search.running, text)
