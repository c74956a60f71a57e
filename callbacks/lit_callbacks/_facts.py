"""Facts about the optimizer step under way, measured at most once and shared by all our callbacks on a trainer.

Nothing is computed until asked for. It all stays on the device, but for :meth:`StepFacts.reading`: what actors decide
on, in one collective and one read by the host for all of them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_callbacks import _deepspeed
from lit_callbacks._ranks import rows_of_ranks
from lit_callbacks._shards import gradient, share_norms
from lit_callbacks.functional import tensor_norms


class Gradients(NamedTuple):
    """The parameters of an optimizer that have a gradient; the fp32 L2 norm of each of these, and of all together.

    Where gradients are sharded, the norms are this rank's share; see :func:`~lit_callbacks._shards.share_norms`.
    """

    parameters: list[Tensor]
    norms: Tensor
    total: Tensor


class Reading(NamedTuple):
    """What all ranks agree on about a step.

    The loss is the mean over ranks and micro-batches, None if there was none; the gradient norm is before clipping.
    """

    loss: float | None
    grad_norm: float
    first_bad_rank: int | None

    @property
    def finite(self) -> bool:
        """Whether the loss is; a step without one has nothing wrong with it."""
        return self.loss is None or math.isfinite(self.loss)


class StepFacts:
    """Loss and gradient norms of the current optimizer step, on this rank unless said otherwise."""

    def __init__(self) -> None:
        self._recorder: Callback | None = None
        self._step = -1
        self._losses: list[Tensor] = []
        self._gradients: tuple[tuple[int, int], Gradients] | None = None
        self._reading: tuple[tuple[int, int], Reading] | None = None

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
        scale = amp_scale(trainer)
        return losses if scale is None else losses / scale

    def shown(self, step: int) -> list[Tensor]:
        """Those of a step, one by one as the hook showed them: divided by accumulate_grad_batches, and scaled."""
        return list(self._losses) if self._step == step else []

    def gradients(self, trainer: Trainer, optimizer: Optimizer) -> Gradients:
        """Norms of the unscaled, accumulated gradients of the optimizer's parameters before clipping."""
        key = (trainer.global_step, id(optimizer))
        if self._gradients is None or self._gradients[0] != key:
            self._gradients = key, _gradients(trainer, optimizer)
        return self._gradients[1]

    def grad_norm(self, trainer: Trainer, optimizer: Optimizer) -> Tensor:
        """The norm of all of them together, on this rank."""
        return self.gradients(trainer, optimizer).total

    def reading(self, trainer: Trainer, optimizer: Optimizer) -> Reading:
        """Loss and gradient norm over all ranks, on the host. All ranks must ask together."""
        key = (trainer.global_step, id(optimizer))
        if self._reading is None or self._reading[0] != key:
            losses = self.losses(trainer)
            norm = self.grad_norm(trainer, optimizer).to(losses.device)
            mine = torch.stack([losses.sum(), torch.full_like(norm, len(losses)), norm])
            self._reading = key, _read(rows_of_ranks(trainer, mine).tolist())
        return self._reading[1]


def _read(ranks: list[list[float]]) -> Reading:
    sums, counts, norms = zip(*ranks, strict=True)
    bad = [rank for rank, total in enumerate(sums) if not math.isfinite(total)]
    loss = sum(sums) / sum(counts) if any(counts) else None
    # Gradients that every rank has are the same on all; of sharded ones each has a share.
    norm = norms[0] if len(set(norms)) == 1 else math.sqrt(math.fsum(n * n for n in norms) / len(norms))
    return Reading(loss, norm, bad[0] if bad else None)


def _gradients(trainer: Trainer, optimizer: Optimizer) -> Gradients:
    scale = amp_scale(trainer)
    with_gradient, gradients = own_gradients(trainer, optimizer)
    norms = own_norms(trainer, gradients, with_gradient)
    # Fused optimizers unscale inside step(), so until then their gradients are multiplied.
    if scale is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        norms = norms / scale
    return Gradients(with_gradient, norms, torch.linalg.vector_norm(norms))


def own_gradients(trainer: Trainer, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """The module's parameters that have a gradient, and what this rank has of it: accumulated, and not yet clipped."""
    if (engine := _deepspeed.engine_of(trainer)) is not None:
        return [*_deepspeed.trained(engine)], _deepspeed.gradient_parts(engine)
    found = [(p, g) for p in parameters(optimizer) if (g := gradient(p)) is not None]
    return [p for p, _ in found], [g for _, g in found]


def own_weights(trainer: Trainer, optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """The module's parameters that are trained, and what this rank has of them, in the same memory."""
    if (engine := _deepspeed.engine_of(trainer)) is not None:
        return [*_deepspeed.trained(engine)], _deepspeed.weight_parts(engine)
    trained = [parameter for parameter in parameters(optimizer) if parameter.requires_grad]
    return trained, [parameter.detach() for parameter in trained]


def own_norms(trainer: Trainer, tensors: Sequence[Tensor], of: Sequence[Tensor]) -> Tensor:
    """This rank's share in the norms of what it has of some parameters, or of their gradients.

    See :func:`~lit_callbacks._shards.share_norms`.
    """
    if _deepspeed.engine_of(trainer) is not None:
        return tensor_norms(tensors) * math.sqrt(trainer.world_size)
    return share_norms(tensors, of=of)


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """Everything that an optimizer steps on, in the order of its groups; of ZeRO's, this rank's part of each group."""
    if _deepspeed.is_zero(optimizer):
        return _deepspeed.flat_parts(optimizer)
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def has_scaler(trainer: Trainer) -> bool:
    """Whether a GradScaler is at work."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and bool(scaler.is_enabled())


def amp_scale(trainer: Trainer) -> Tensor | None:
    """The GradScaler's factor on the device, without the host sync of ``get_scale()``; None when there is no scaler."""
    if not has_scaler(trainer):
        return None
    one = torch.ones((), device=trainer.strategy.root_device)
    scaled: Tensor = trainer.precision_plugin.scaler.scale(one)  # type: ignore[attr-defined]
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
