"""What a forward pass changes besides the gradients: buffers, metrics and random number generators."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_callbacks._rng import rng_state, set_rng_state


class ForwardState:
    """A copy of what forward passes change, so that they can be taken back.

    Buffers are the persistent, non-boolean ones, such as BatchNorm's statistics and counters; boolean buffers are
    masks, which nothing writes to. Metrics are the torchmetrics that belong to the module.

    Args:
        module: Whose forward passes.
        device: Where it computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._places = [
            (owner, name)
            for owner in module.modules()
            if not isinstance(owner, Metric)
            for name, buffer in owner.named_buffers(recurse=False)
            if name not in owner._non_persistent_buffers_set and buffer.dtype != torch.bool
        ]
        self._metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
        self._buffers = [buffer.clone() for buffer in self._live()]
        self.save()

    def save(self) -> None:
        """Copy everything as it is now; buffers into the place of the last copy."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._live())
        self._values = [_values(metric) for metric in self._metrics]
        self._rng = rng_state(self._device)

    def restore(self) -> None:
        """Put everything back as it was at the last :meth:`save`."""
        if self._buffers:
            torch._foreach_copy_(self._live(), self._buffers)
        for metric, values in zip(self._metrics, self._values, strict=True):
            for name, value in values.items():
                setattr(metric, name, _copy(value))
        set_rng_state(self._rng, self._device)

    def _live(self) -> list[Tensor]:
        return [owner.get_buffer(name).detach() for owner, name in self._places]


def _values(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed"]
    return {name: _copy(getattr(metric, name)) for name in names}


def _copy(value: Any) -> Any:
    # A list of what each update brought grows, but its tensors are not written to.
    return list(value) if isinstance(value, list) else value.clone() if isinstance(value, Tensor) else value
