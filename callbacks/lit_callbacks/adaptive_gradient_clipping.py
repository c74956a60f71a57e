"""Is this gradient far larger than usual? Then it is scaled down."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lit_callbacks._actor import Actor
from lit_callbacks._cadence import Cadence
from lit_callbacks._deepspeed import clip_step, is_zero, step_follows
from lit_callbacks._errors import SetupError
from lit_callbacks._facts import facts_of, has_scaler, parameters
from lit_callbacks._member import publish
from lit_callbacks._z_score import EPSILON, ZScoreThreshold


class AdaptiveGradientClipping(Actor):
    r"""Clip the gradient to a norm that follows what is usual for this run, as ZClip does.

    :math:`\mu` and :math:`\sigma^2` are exponential moving averages of mean and variance of the global gradient norm
    :math:`g`. Where :math:`z = (g - \mu) / (\sigma + 10^{-6})` is above ``z_threshold``, written :math:`z_0`, the
    gradient is scaled down to the norm :math:`\mu + \sigma z_0^2 / z`: the further out, the closer to the mean. No norm
    is left above ``max_grad_norm``, which alone holds during the first ``warmup_steps`` steps. The averages learn what
    the z-score leaves of a norm, before ``max_grad_norm`` (Kumar et al. 2025, *ZClip: Adaptive Spike Mitigation for LLM
    Pre-Training*, arXiv 2504.02507; the numbers are those of the authors' implementation).

    A gradient that is not finite is neither clipped nor learnt from: :class:`~lit_callbacks.NonFiniteGuard`, or a
    GradScaler, drops it. Neither is a step learnt from whose loss is not finite. A step that another callback skips for
    other reasons counts as if it had been taken.

    A norm that jumps and stays there is clipped to the old level for ``warmup_steps`` steps, and then a new warm-up
    begins; ZClip would go on for ever. Resuming with another ``warmup_steps`` begins new averages.

    Under FSDP1, where Lightning refuses to clip by norm, ``z_threshold=math.inf`` leaves ``max_grad_norm`` alone. Under
    DeepSpeed ZeRO clips, to the norm that it is told for the coming step.

    Logs, every ``every_n_steps`` optimizer steps and whenever the z-score is above ``z_threshold``:
        grad_norm/threshold: norm above which a gradient was clipped; infinite in a warm-up without ``max_grad_norm``.
        grad_norm/clip_coefficient: factor that the gradient was scaled by; 1 if it was not.

    Args:
        alpha: Weight of the past in the averages.
        z_threshold: The z-score above which a norm is brought down.
        max_grad_norm: Largest norm in any case, as ``Trainer(gradient_clip_val=...)``; ``math.inf`` for none.
        warmup_steps: Steps whose norms are collected before any is judged.
        every_n_steps: Optimizer steps between logged values.

    Raises:
        ValueError: If an argument is out of range; at setup in manual optimization, with
            ``gradient_clip_val`` set, or if another one is among the callbacks; at fit start if
            the optimizer is LBFGS, or is fused while a GradScaler is in use.

    State: both averages and the norms of the warm-up.

    Cost: the gradient norm and one read by the host on every step, shared with all our other actors; a pass over the
    gradients on steps that are clipped.

    Example:
        >>> AdaptiveGradientClipping(max_grad_norm=2.0).z_threshold
        2.5
    """

    serves_shards = True
    serves_zero = True

    order = 1

    def __init__(
        self,
        alpha: float = 0.97,
        z_threshold: float = 2.5,
        max_grad_norm: float = 1.0,
        warmup_steps: int = 25,
        every_n_steps: int = 50,
    ) -> None:
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, got {max_grad_norm}")
        super().__init__()
        self.alpha = alpha
        self.z_threshold = z_threshold
        self.max_grad_norm = max_grad_norm
        self.warmup_steps = warmup_steps
        self.every_n_steps = every_n_steps
        self._usual = ZScoreThreshold(alpha, z_threshold, warmup_steps)
        self._cadence = Cadence(every_n_steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse manual optimization, and whatever else clips."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise SetupError(
                "AdaptiveGradientClipping needs automatic optimization: in manual optimization your training_step may "
                "have clipped already, and several optimizers would share one average. Call "
                "torch.nn.utils.clip_grad_norm_ in your training_step, or leave the callback out."
            )
        if trainer.gradient_clip_val:
            raise SetupError(
                f"AdaptiveGradientClipping and gradient_clip_val={trainer.gradient_clip_val} would clip twice. Leave "
                f"gradient_clip_val out (null in YAML), and give its value to the callback as max_grad_norm."
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, AdaptiveGradientClipping) for callback in callbacks) > 1:
            raise SetupError("Two AdaptiveGradientClipping callbacks would clip twice. Keep one of them.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse optimizers whose gradient is not there to be clipped once per step."""
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):
                raise SetupError(
                    "AdaptiveGradientClipping cannot clip for LBFGS, which needs several gradients in one step and "
                    "their true lengths. Use another optimizer, or leave the callback out."
                )
            if has_scaler(trainer) and getattr(optimizer, "_step_supports_amp_scaling", False):
                raise SetupError(
                    f"AdaptiveGradientClipping cannot clip for a fused {type(optimizer).__name__} under a GradScaler, "
                    "which unscales gradients inside its step. Use fused=False, or precision='bf16-mixed'."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin counting, also in the middle of a resumed run."""
        self._cadence.start(trainer.global_step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the shared facts see the loss."""
        facts_of(trainer).record_loss(self, trainer.global_step, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip by the norm that all ranks share, learn from it, and log."""
        if not step_follows(trainer):
            return
        reading = facts_of(trainer).reading(trainer, optimizer)  # before clipping, for all who ask later
        norm = reading.grad_norm
        if reading.loss is None or not math.isfinite(norm):
            return
        usual = self._usual.threshold(norm)
        largest = min(usual, self.max_grad_norm)
        coefficient = largest / (norm + EPSILON) if norm > largest else 1.0
        if coefficient < 1:
            if is_zero(optimizer):
                clip_step(optimizer, largest)
            else:
                _scale(optimizer, coefficient)
        values = {
            "grad_norm/threshold": min(self._usual.limit, self.max_grad_norm),
            "grad_norm/clip_coefficient": coefficient,
        }
        if reading.finite:
            self._usual.update(norm)
        if self._cadence.due(trainer.global_step) or usual < norm:
            publish(trainer, pl_module, trainer.global_step, values, summary=())

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return self._usual.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on clipping."""
        self._usual.load_state_dict(state_dict)


def _scale(optimizer: Optimizer, factor: float) -> None:
    # A number, not a tensor, so that gradients may lie on several devices and bf16 is multiplied in fp32.
    with torch.no_grad():
        torch._foreach_mul_([p.grad for p in parameters(optimizer) if p.grad is not None], factor)
