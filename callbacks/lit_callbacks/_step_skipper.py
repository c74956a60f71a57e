"""The base of actors that can skip an optimizer step."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lit_callbacks import _ranks
from lit_callbacks._deepspeed import engine_of, is_zero
from lit_callbacks._errors import SetupError
from lit_callbacks._facts import Reading, facts_of, has_scaler, own_gradients
from lit_callbacks._member import refuse_unknown_engine
from lit_callbacks._names import clean_name
from lit_callbacks._probe import group_settings, step_without_gradients_fault
from lit_callbacks._shards import local
from lit_callbacks._step import after_step
from lit_callbacks._window_actor import WindowActor
from lit_callbacks.functional import tensor_norms
from lit_callbacks.protocols import HasSampleIds


class DivergenceError(RuntimeError):
    """Training cannot go on by itself. The message says whether the weights in memory are good, and what to do."""


class StepSkipper(WindowActor):
    """Keeps what is needed to take a step back before it is made, and refuses runs in which that cannot be done.

    A subclass decides in ``on_before_optimizer_step``, and calls :meth:`skip`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._scaler: dict[str, Any] | None = None
        self._hook: Any = None
        self._settings: list[dict[str, Any]] = []

    def keeps_batches(self, trainer: Trainer) -> bool:
        """Where their samples can be named."""
        return _data(trainer) is not None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers whose step cannot be skipped."""
        ours = type(self).__name__
        refuse_unknown_engine(self, trainer)
        if engine_of(trainer) is not None and str(trainer.precision).startswith("16"):
            raise SetupError(
                f"{ours} cannot tell a bad step from DeepSpeed's search for its loss scale, which precision="
                f"'{trainer.precision}' has. Use precision='bf16-mixed', or leave the callback out."
            )
        for optimizer in trainer.optimizers:
            if is_zero(optimizer):
                continue  # whose step is passed over as a whole, whatever is inside
            name = type(optimizer).__name__
            if has_scaler(trainer) and getattr(optimizer, "_step_supports_amp_scaling", False):
                raise SetupError(
                    f"{ours} cannot skip a step of a fused {name} under a GradScaler: torch raises an AssertionError "
                    "when gradients are missing. Use fused=False, or precision='bf16-mixed'."
                )
            if fault := step_without_gradients_fault(optimizer):
                raise SetupError(
                    f"{ours} skips a step by removing the gradients, which is not safe with {name}: {fault}. Use an "
                    "optimizer that ignores parameters without gradients, as torch.optim.AdamW does, or leave the "
                    "callback out."
                )

    def skip(self, trainer: Trainer, optimizer: Optimizer, reading: Reading) -> None:
        """Make the coming step change nothing: neither weights nor anything that its forward passes have touched."""
        self.window.undo(optimizer)
        self.keep_settings(optimizer)
        self._hook = after_step(optimizer, lambda: self._put_settings_back(optimizer))
        # The scaler counts this step after us. Where only the gradient overflowed, it has to: that is its search.
        if has_scaler(trainer) and not (reading.finite and not math.isfinite(reading.grad_norm)):
            self._scaler = trainer.precision_plugin.state_dict()

    def keep_settings(self, optimizer: Optimizer) -> None:
        """What the groups say now is what they will say after the step: some optimizers count their steps there."""
        self._settings = group_settings(optimizer)

    def _put_settings_back(self, optimizer: Optimizer) -> None:
        for group, before in zip(optimizer.param_groups, self._settings, strict=True):
            group.update(before)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put the scaler back, which has counted a skipped step by now."""
        self._unhook()
        if self._scaler is not None:
            trainer.precision_plugin.load_state_dict(self._scaler)
            self._scaler = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        super().on_exception(trainer, pl_module, exception)
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def describe(self, trainer: Trainer, pl_module: LightningModule, reading: Reading) -> dict[str, Any]:
        """What is known about a bad step: its numbers, its samples on all ranks, and where it is not finite."""
        first_bad_rank = reading.first_bad_rank
        losses = facts_of(trainer).losses(trainer).tolist()
        ids: list[int] = []
        if (data := _data(trainer)) is not None:
            for micro_batch, loss in zip(self.window.micro_batches, losses, strict=True):
                if first_bad_rank is None or not math.isfinite(loss):
                    ids += data.sample_ids(micro_batch.batch)
        finite = reading.finite and math.isfinite(reading.grad_norm)
        parameter = None if finite else _first_non_finite(trainer, pl_module)
        reports = _ranks.gather(trainer, (sum(losses) / max(len(losses), 1), ids, parameter))
        return {
            "loss": reading.loss if first_bad_rank is None else reports[first_bad_rank][0],
            "grad_norm": reading.grad_norm,
            "parameter": min((found for *_, found in reports if found is not None), default=(0, None))[1],
            "first_bad_rank": first_bad_rank,
            "sample_ids": list(dict.fromkeys(i for _, ids, _ in reports for i in ids)) or None,
        }


def _data(trainer: Trainer) -> HasSampleIds | None:
    data: object = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, HasSampleIds) else None


def _first_non_finite(trainer: Trainer, module: LightningModule) -> tuple[int, str] | None:
    """Place and name of the first parameter whose gradient is not finite in this rank's part."""
    with_gradient, gradients = own_gradients(trainer, trainer.optimizers[0])
    finite = tensor_norms([local(gradient) for gradient in gradients]).isfinite().tolist()
    bad = {id(parameter) for parameter, ok in zip(with_gradient, finite, strict=True) if not ok}
    named = enumerate(module.named_parameters())
    return next(((i, clean_name(name)) for i, (name, parameter) in named if id(parameter) in bad), None)
