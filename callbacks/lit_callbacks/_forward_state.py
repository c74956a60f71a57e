"""What a forward pass changes besides the gradients: buffers, metrics and random number generators."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
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
        self._module, self._device = module, device
        self._metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
        self._places: list[tuple[nn.Module, str]] = []
        self._any_lazy = True
        self._buffers: dict[tuple[nn.Module, str], Tensor] = {}
        self.save()

    def save(self) -> None:
        """Copy everything as it is now; buffers into the place of the last copy."""
        live = self._live()
        if not _alike(self._buffers, live):  # at first, and where lazy modules or growing buffers changed their shape
            self._buffers = {place: buffer.clone() for place, buffer in live.items()}
        elif live:
            torch._foreach_copy_([self._buffers[place] for place in live], list(live.values()))
        self._values = [values_of(metric) for metric in self._metrics]
        self._rng = rng_state(self._device)

    def restore(self) -> None:
        """Put everything back as it was at the last :meth:`save`."""
        live = self._live()
        for place, saved in self._buffers.items():
            buffer, (owner, name) = live.get(place), place
            if buffer is not None and buffer.shape == saved.shape:
                buffer.copy_(saved)
            else:
                setattr(owner, name, saved.clone())
        for metric, values in zip(self._metrics, self._values, strict=True):
            set_values(metric, values)
        set_rng_state(self._rng, self._device)

    def _live(self) -> dict[tuple[nn.Module, str], Tensor]:
        if self._any_lazy:
            found = [
                (owner, name, buffer)
                for owner in self._module.modules()
                if not isinstance(owner, Metric)
                for name, buffer in owner.named_buffers(recurse=False)
                if name not in owner._non_persistent_buffers_set and buffer.dtype != torch.bool
            ]
            self._places = [(owner, name) for owner, name, buffer in found if not is_lazy(buffer)]
            self._any_lazy = len(self._places) < len(found)
        buffers = ((owner, name, owner._buffers.get(name)) for owner, name in self._places)
        return {(owner, name): buffer.detach() for owner, name, buffer in buffers if buffer is not None}


def values_of(metric: Metric) -> dict[str, Any]:
    """A copy of what updates of a metric have added up."""
    names = [*metric._defaults, "_update_count", "_computed"]
    return {name: _copy(getattr(metric, name)) for name in names}


def set_values(metric: Metric, values: dict[str, Any]) -> None:
    """Put back what :func:`values_of` returned."""
    for name, value in values.items():
        setattr(metric, name, _copy(value))


def _alike(saved: Mapping[Any, Tensor], live: Mapping[Any, Tensor]) -> bool:
    same = saved.keys() == live.keys()
    return same and all(saved[k].shape == t.shape and saved[k].dtype == t.dtype for k, t in live.items())


def _copy(value: Any) -> Any:
    # A list of what each update brought grows, but its tensors are not written to.
    return list(value) if isinstance(value, list) else value.clone() if isinstance(value, Tensor) else value
