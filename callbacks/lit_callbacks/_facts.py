"""Facts about the optimizer step under way, measured at most once and shared by all our callbacks on a trainer.

Everything here stays on the device: nothing is computed until asked for, and nothing is read back to the host.
"""

from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_callbacks.functional import total_norm


class StepFacts:
    """Loss and gradient norm of the current optimizer step, on this rank."""

    def __init__(self) -> None:
        self._recorder: Callback | None = None
        self._step = -1
        self._losses: list[Tensor] = []
        self._grad_norm: tuple[int, int, Tensor] | None = None

    def record_loss(self, recorder: Callback, step: int, loss: Tensor) -> None:
        """Remember a micro-batch's loss. Every callback that asks for losses reports it; only the first is heard."""
        if self._recorder is None:
            self._recorder = recorder
        if recorder is not self._recorder:
            return
        if step != self._step:
            self._step = step
            self._losses = []
        self._losses.append(loss.detach())

    def losses(self, trainer: Trainer) -> Tensor:
        """Losses of this step's micro-batches as the module returned them, shape ``(micro-batches,)``, fp32."""
        if self._step != trainer.global_step:
            return torch.zeros(0, device=trainer.strategy.root_device)
        # Lightning divides by accumulate_grad_batches, and the scaler multiplies, before the hook that shows the loss.
        losses = torch.stack([loss.reshape(()) for loss in self._losses]).float() * trainer.accumulate_grad_batches
        scale = amp_scale(trainer, losses.device)
        return losses if scale is None else losses / scale

    def grad_norm(self, trainer: Trainer, optimizer: Optimizer) -> Tensor:
        """fp32 L2 norm of the unscaled, accumulated gradient of the optimizer's parameters before clipping."""
        key = (trainer.global_step, id(optimizer))
        if self._grad_norm is None or self._grad_norm[:2] != key:
            norm = total_norm([p.grad for p in parameters(optimizer) if p.grad is not None])
            # Fused optimizers unscale inside step(), so their gradients are still multiplied here.
            if getattr(optimizer, "_step_supports_amp_scaling", False):
                scale = amp_scale(trainer, norm.device)
                norm = norm if scale is None else norm / scale
            self._grad_norm = (*key, norm)
        return self._grad_norm[2]


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """Every parameter of an optimizer, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def has_scaler(trainer: Trainer) -> bool:
    """Whether a GradScaler is at work."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and bool(scaler.is_enabled())


def amp_scale(trainer: Trainer, device: torch.device) -> Tensor | None:
    """The GradScaler's factor on the device, without the host sync of ``get_scale()``; None when there is no scaler."""
    if not has_scaler(trainer):
        return None
    scaled: Tensor = trainer.precision_plugin.scaler.scale(torch.ones((), device=device))  # type: ignore[attr-defined]
    return scaled


_FACTS: WeakKeyDictionary[Trainer, StepFacts] = WeakKeyDictionary()


def facts_of(trainer: Trainer) -> StepFacts:
    """The facts that all our callbacks on this trainer share."""
    facts = _FACTS.get(trainer)
    if facts is None:
        facts = _FACTS[trainer] = StepFacts()
    return facts


def forget(trainer: Trainer) -> None:
    """Drop the facts of a trainer, and the tensors they hold."""
    _FACTS.pop(trainer, None)
