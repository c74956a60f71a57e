"""A copy of the buffers that a forward pass may change, such as BatchNorm's running statistics."""

import torch
from torch import Tensor, nn


class BufferCopy:
    """Keeps the persistent, non-boolean buffers of a module, so that a forward pass can be taken back.

    Counters are copied with the floating-point statistics; boolean buffers are masks, which nothing writes to.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (owner, name)
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False)
            if name not in owner._non_persistent_buffers_set and buffer.dtype != torch.bool
        ]
        self._saved = [buffer.clone() for buffer in self._live()]

    def save(self) -> None:
        """Copy the buffers as they are now."""
        if self._saved:
            torch._foreach_copy_(self._saved, self._live())

    def restore(self) -> None:
        """Put the buffers back as they were at the last :meth:`save`."""
        if self._saved:
            torch._foreach_copy_(self._live(), self._saved)

    def _live(self) -> list[Tensor]:
        return [owner.get_buffer(name).detach() for owner, name in self._places]
