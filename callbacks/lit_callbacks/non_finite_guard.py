"""What happens when a loss or a gradient is not a number?"""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lit_callbacks._deepspeed import step_follows
from lit_callbacks._facts import facts_of, has_scaler
from lit_callbacks._member import publish
from lit_callbacks._step_skipper import DivergenceError, StepSkipper


class NonFiniteError(DivergenceError):
    """Too many steps in a row had no finite loss or gradient. The weights are still those of the last good step."""


class NonFiniteGuard(StepSkipper):
    r"""Skip an optimizer step whose loss or gradient is NaN or infinite, on all ranks together.

    A skipped step leaves weights, optimizer state, persistent buffers (BatchNorm's statistics), metrics and random
    number generators exactly as they were: the gradients are set to None, because zeroed ones still move weights by
    momentum and decay, and ``0 * nan`` is NaN. The learning-rate schedule and ``trainer.global_step`` go on. With
    accumulation the whole window is dropped. An infinite *gradient* under a GradScaler is how the scaler searches for
    its factor, and is left to it.

    What was skipped is appended to ``events.jsonl`` in the run folder, with the first rank that saw it and, where the
    data module offers ``sample_ids`` (see :mod:`lit_callbacks.protocols`), the samples; so is the end of patience, as
    ``stop``. If that file cannot be written, a warning says so once and training goes on.

    Logs, when they change:
        loss_spike/nonfinite: steps with a non-finite loss or gradient so far. Also in ``trainer.callback_metrics``.
        loss_spike/skipped_steps: steps skipped so far. Also in ``trainer.callback_metrics``.

    Args:
        patience: Skipped steps in a row after which training stops.

    Raises:
        ValueError: If ``patience`` is below 1; at setup in manual optimization or under DeepSpeed with fp16;
            at fit start if the optimizer moves without gradients, cannot be tried on a toy parameter, or is
            fused while a GradScaler is in use.
        NonFiniteError: After ``patience`` skipped steps in a row.

    State: the two counters and the number of skipped steps in a row.

    Cost: the gradient norm and one read by the host on every step; at every window's start a copy of the generators'
    states (20 microseconds) and of the buffers, if the model has any. Where the data module offers ``sample_ids``, the
    batches of a window are kept until the next.

    Example:
        >>> NonFiniteGuard(patience=3).patience
        3
    """

    serves_shards = True
    serves_zero = True

    def __init__(self, patience: int = 10) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        super().__init__()
        self.patience = patience
        self._counts = {"nonfinite": 0, "skipped_steps": 0, "in_a_row": 0}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Agree on whether this step is finite; if it is not, skip it and say so."""
        if not step_follows(trainer):
            return
        reading = facts_of(trainer).reading(trainer, optimizer)
        if reading.finite and (math.isfinite(reading.grad_norm) or has_scaler(trainer)):
            self._counts["in_a_row"] = 0
            return
        for key in self._counts:
            self._counts[key] += 1
        event = {
            "step": trainer.global_step,
            "event": "skip",
            "rule": "non_finite_gradient" if reading.first_bad_rank is None else "non_finite_loss",
            "in_a_row": self._counts["in_a_row"],
            **self.describe(trainer, pl_module, reading),
        }
        self.skip(trainer, optimizer, reading)
        self.events.write(**event)
        values = {f"loss_spike/{key}": float(self._counts[key]) for key in ("nonfinite", "skipped_steps")}
        publish(trainer, pl_module, event["step"], values, summary=values)
        if self._counts["in_a_row"] >= self.patience:
            message = _message(event)
            self.events.write(**{**event, "event": "stop", "text": message})
            raise NonFiniteError(message)

    def has_open_anomaly(self) -> bool:
        """Whether the last step was skipped."""
        return self._counts["in_a_row"] > 0

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return dict(self._counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._counts = dict(state_dict)


def _message(event: dict[str, Any]) -> str:
    loss_is_bad = event["rule"] == "non_finite_loss"
    what = f"the loss is {event['loss']}" if loss_is_bad else f"the gradient norm is {event['grad_norm']}"
    where = [
        f"first on rank {event['first_bad_rank']}" if loss_is_bad else "",
        f"first parameter with a non-finite gradient: {event['parameter']}" if event["parameter"] else "",
        f"samples: {event['sample_ids']}" if event["sample_ids"] else "",
    ]
    return (
        f"Stopped at step {event['step']} after {event['in_a_row']} skipped steps in a row: {what} "
        f"({'; '.join(filter(None, where))}). The weights are those of the last good step. Try a lower learning rate "
        "or a longer warmup, gradient_clip_val=1.0, or precision='bf16-mixed' or '32-true'; if it is always the same "
        "samples, look at the data."
    )
