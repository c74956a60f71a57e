"""May this state be kept? Not when it is not finite, and only with a mark while an anomaly is open."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_callbacks import _ranks
from lit_callbacks._shards import local
from lit_callbacks._training_state import live_tensors
from lit_callbacks.functional import tensor_norms
from lit_callbacks.protocols import HasOpenAnomaly


def non_finite_tensors(trainer: Trainer, module: LightningModule) -> list[str]:
    """Names of the weights, frozen ones too, buffers and optimizer states of this rank that are not finite everywhere.

    Cost: one pass over them and one read by the host.
    """
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    tensors = {name: _plain(tensor) for name, tensor in live_tensors(trainer, module, also=frozen).items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    names: list[str] = []
    for device in {tensor.device for tensor in tensors.values()}:
        here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        finite = tensor_norms(list(here.values())).isfinite().tolist()
        # A norm may overflow where no element does.
        names += [name for name, ok in zip(here, finite, strict=True) if not ok and not here[name].isfinite().all()]
    return names


def open_anomaly(trainer: Trainer) -> str | None:
    """Which callback is in the middle of an anomaly, if any."""
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    return next((type(c).__name__ for c in callbacks if isinstance(c, HasOpenAnomaly) and c.has_open_anomaly()), None)


def any_rank(trainer: Trainer, flag: bool) -> bool:
    """Whether any rank says so."""
    return bool(_ranks.largest(trainer, torch.tensor([float(flag)], device=trainer.strategy.root_device)).item())


def _plain(tensor: Tensor) -> Tensor:
    """This rank's part, as real numbers of a type that can be calculated with."""
    part = local(tensor)
    if part.is_complex():
        return torch.view_as_real(part.resolve_conj())
    return part.float() if part.is_floating_point() and part.element_size() == 1 else part
