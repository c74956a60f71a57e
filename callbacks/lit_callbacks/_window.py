"""The micro-batches of the optimizer step under way, and how to undo it before it is made."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_callbacks._facts import facts_of
from lit_callbacks._forward_state import ForwardState, set_values, values_of
from lit_callbacks._rng import rng_state
from lit_callbacks._step import prevent_step


class MicroBatch(NamedTuple):
    """A batch that had a loss, its index in the epoch, and the states of the generators before its forward pass."""

    batch: Any
    batch_idx: int
    generators: dict[str, Any] | None = None


class Window:
    """What one accumulation window has seen, and what its forward passes changed.

    Args:
        trainer: The trainer.
        module: The module that is trained.
        keep_batches: Whether to hold on to the batches until the next window begins.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, keep_batches: bool = True) -> None:
        self._trainer, self._device = trainer, trainer.strategy.root_device
        self._logged: dict[str, dict[str, Any]] = {}
        self._before = ForwardState(module, self._device)
        self._keep_batches = keep_batches
        self.current: MicroBatch | None = None
        """The batch under way, where batches are kept."""
        self.micro_batches: list[MicroBatch] = []

    def start_batch(self, trainer: Trainer, batch: Any, batch_idx: int) -> bool:
        """Take note of a batch before its forward pass; whether it is the first of a window."""
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first:
            self.micro_batches = []
            self._before.save()
            self._logged = {key: values_of(result) for key, result in _logged(trainer).items()}
        if self._keep_batches:
            # The container is copied, because some training steps pop their labels out of it.
            kept = copy.copy(batch) if isinstance(batch, Mapping | list) else batch
            self.current = MicroBatch(kept, batch_idx, rng_state(self._device))
        return first

    def record_loss(self, recorder: Any, trainer: Trainer, loss: Tensor) -> None:
        """Let the shared facts see the loss of the current batch."""
        facts_of(trainer).record_loss(recorder, trainer.global_step, loss)
        if self.current is not None:
            self.micro_batches.append(self.current)

    def undo(self, optimizer: Optimizer) -> None:
        """Make the coming optimizer step change nothing, and take back what the forward passes changed."""
        prevent_step(optimizer)
        self.rewind()
        # What the module logged enters the means of an epoch, which EarlyStopping and schedules look at. Values of the
        # step itself stay: a curve shows what was skipped.
        for key, result in _logged(self._trainer).items():
            if key in self._logged:
                set_values(result, self._logged[key])
            else:
                result.reset()

    def rewind(self) -> None:
        """Put back what the forward passes changed: buffers, metrics and generators are as the window found them."""
        self._before.restore()


def _logged(trainer: Trainer) -> dict[str, Any]:
    """What ``self.log`` has added up in training, by key: torchmetrics, each of them."""
    results: dict[str, Any] | None = trainer._results
    return {} if results is None else dict(results)
