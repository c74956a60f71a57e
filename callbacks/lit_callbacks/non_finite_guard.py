"""What happens when a loss or a gradient is not a number?"""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_callbacks import _ranks
from lit_callbacks._actor import Actor
from lit_callbacks._errors import SetupError
from lit_callbacks._facts import Reading, facts_of, has_scaler
from lit_callbacks._member import publish
from lit_callbacks._names import clean_name
from lit_callbacks._probe import step_without_gradients_fault
from lit_callbacks._window import Window
from lit_callbacks.functional import tensor_norms
from lit_callbacks.protocols import HasSampleIds


class NonFiniteError(RuntimeError):
    """Too many steps in a row had no finite loss or gradient. The weights are still those of the last good step."""


class NonFiniteGuard(Actor):
    r"""Skip an optimizer step whose loss or gradient is NaN or infinite, on all ranks together.

    A skipped step leaves weights, optimizer state, persistent buffers (BatchNorm's statistics), metrics and random
    number generators exactly as they were: the gradients are set to None, because zeroed ones still move weights by
    momentum and decay, and ``0 * nan`` is NaN. The learning-rate schedule and ``trainer.global_step`` go on. With
    accumulation the whole window is dropped. An infinite *gradient* under a GradScaler is how the scaler searches for
    its factor, and is left to it.

    What was skipped is appended to ``events.jsonl`` in the run folder, with the first rank that saw it and, where the
    data module offers ``sample_ids`` (see :mod:`lit_callbacks.protocols`), the samples. If that file cannot be written,
    a warning says so once and training goes on.

    Logs, when they change:
        loss_spike/nonfinite: steps with a non-finite loss or gradient so far. Also in ``trainer.callback_metrics``.
        loss_spike/skipped_steps: steps skipped so far. Also in ``trainer.callback_metrics``.

    Args:
        patience: Skipped steps in a row after which training stops.

    Raises:
        ValueError: If ``patience`` is below 1; at setup in manual optimization or under a strategy that shards
            gradients; at fit start if the optimizer moves without gradients, cannot be tried on a toy parameter, or is
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

    def __init__(self, patience: int = 10) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        super().__init__()
        self.patience = patience
        self._counts = {"nonfinite": 0, "skipped_steps": 0, "in_a_row": 0}
        self._window: Window | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse manual optimization."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not pl_module.automatic_optimization:
            raise SetupError(
                "NonFiniteGuard needs automatic optimization: in manual optimization it cannot tell which losses "
                "belong to which optimizer step. Skip such steps in your training_step, or leave the callback out."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers whose step cannot be skipped."""
        for optimizer in trainer.optimizers:
            name = type(optimizer).__name__
            if has_scaler(trainer) and getattr(optimizer, "_step_supports_amp_scaling", False):
                raise SetupError(
                    f"NonFiniteGuard cannot skip a step of a fused {name} under a GradScaler: torch raises an "
                    "AssertionError when gradients are missing. Use fused=False, or precision='bf16-mixed'."
                )
            if fault := step_without_gradients_fault(optimizer):
                raise SetupError(
                    f"NonFiniteGuard skips a step by removing the gradients, which is not safe with {name}: {fault}. "
                    "Use an optimizer that ignores parameters without gradients, as torch.optim.AdamW does, or leave "
                    "the callback out."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the module now that a checkpoint has been loaded."""
        self._window = Window(trainer, pl_module, keep_batches=_data(trainer) is not None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what the forward pass is about to change."""
        assert self._window is not None
        self._window.start_batch(trainer, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the shared facts see the loss, and remember which batch it belongs to."""
        assert self._window is not None
        self._window.record_loss(self, trainer, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Agree on whether this step is finite; if it is not, skip it and say so."""
        reading = facts_of(trainer).reading(trainer, optimizer)
        if reading.finite and (math.isfinite(reading.grad_norm) or has_scaler(trainer)):
            self._counts["in_a_row"] = 0
            return
        event = self._describe(trainer, pl_module, reading)
        self._skip(optimizer)
        self.events.write(**event)
        values = {f"loss_spike/{key}": float(self._counts[key]) for key in ("nonfinite", "skipped_steps")}
        publish(trainer, pl_module, event["step"], values, summary=values)
        if self._counts["in_a_row"] >= self.patience:
            raise NonFiniteError(_message(event))

    def _skip(self, optimizer: Optimizer) -> None:
        assert self._window is not None
        self._window.undo(optimizer)
        for key in self._counts:
            self._counts[key] += 1

    def _describe(self, trainer: Trainer, pl_module: LightningModule, reading: Reading) -> dict[str, Any]:
        first_bad_rank = reading.first_bad_rank
        losses = facts_of(trainer).losses(trainer).tolist()
        ids: list[int] = []
        if (data := _data(trainer)) is not None and self._window is not None:
            for micro_batch, loss in zip(self._window.micro_batches, losses, strict=True):
                if first_bad_rank is None or not math.isfinite(loss):
                    ids += data.sample_ids(micro_batch.batch)
        reports = _ranks.gather(trainer, (sum(losses) / max(len(losses), 1), ids))
        return {
            "step": trainer.global_step,
            "event": "skip",
            "rule": "non_finite_gradient" if first_bad_rank is None else "non_finite_loss",
            "in_a_row": self._counts["in_a_row"] + 1,
            "loss": reports[first_bad_rank or 0][0],
            "grad_norm": reading.grad_norm,
            "parameter": _first_non_finite(pl_module),
            "first_bad_rank": first_bad_rank,
            "sample_ids": [i for _, ids in reports for i in ids] or None,
        }

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the batches."""
        super().teardown(trainer, pl_module, stage)
        self._window = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the batches."""
        super().on_exception(trainer, pl_module, exception)
        self._window = None

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return dict(self._counts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._counts = dict(state_dict)


def _data(trainer: Trainer) -> HasSampleIds | None:
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, HasSampleIds) else None


def _first_non_finite(module: LightningModule) -> str | None:
    named = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    finite = tensor_norms([gradient for _, gradient in named]).isfinite().tolist()
    return next((clean_name(name) for (name, _), ok in zip(named, finite, strict=True) if not ok), None)


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
