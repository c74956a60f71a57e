"""What is about to be trained, read from a trainer and a module that nobody here wrote."""

import math
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_callbacks._shards import whole_shapes
from lit_callbacks.recipe.curve import learning_rates

_POINTS = 1000
_LONGEST = 100_000  # updates that a scheduler is stepped over
_LABELS = ("labels", "targets", "target", "label", "y")


class Plan:
    """The facts that rules ask for. Each is found out once, when it is first asked for."""

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer, self.module = trainer, module

    # ---- the model

    @cached_property
    def shapes(self) -> dict[int, torch.Size]:
        """The shape of each parameter as a whole, by its ``id``."""
        return whole_shapes(self.trainer, self.module)

    @cached_property
    def has_attention(self) -> bool:
        """Whether it is a transformer, by the names of its modules."""
        return any("attention" in type(m).__name__.lower() or "attn" in name for name, m in self.module.named_modules())

    @cached_property
    def is_post_norm(self) -> bool:
        """Whether the norms are on the residual stream itself."""
        placement = getattr(getattr(self.module, "config", None), "norm_placement", None)
        if placement is not None:
            return bool(placement == "post")
        layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        return any(isinstance(m, layers) and not m.norm_first for m in self.module.modules())

    # ---- the optimizer

    @property
    def optimizers(self) -> list[Optimizer]:
        """All of them."""
        return list(self.trainer.optimizers)

    @cached_property
    def steps(self) -> int | None:
        """Updates of the whole run; None if it has no end."""
        # Read when the loaders are there, so it does not make them (Lightning issue 20550).
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) and steps > 0 else None

    @cached_property
    def rates(self) -> list[list[list[float]]]:
        """By optimizer and group, the learning rate at up to 1000 updates, or at all of a short run."""
        return [self._rates(optimizer) for optimizer in self.optimizers]

    @cached_property
    def updates(self) -> list[int]:
        """The updates of :attr:`rates`, from where the run stands."""
        start = self.trainer.global_step
        length = max(1, min(_LONGEST, (self.steps or _LONGEST) - start))
        points = min(length, _POINTS)
        return [start + i * length // points for i in range(points)]

    def _rates(self, optimizer: Optimizer) -> list[list[float]]:
        start, updates = self.trainer.global_step, self.updates
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if isinstance(scheduler, ReduceLROnPlateau) or not isinstance(scheduler, LRScheduler):
                continue
            if scheduler.optimizer is optimizer and config.interval == "step":
                return learning_rates(optimizer, scheduler, updates, start)
            if scheduler.optimizer is optimizer:
                length = max(1, math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches))
                epochs = sorted({update // length for update in updates})
                found = learning_rates(optimizer, scheduler, epochs, start // length)
                return [[rates[epochs.index(update // length)] for update in updates] for rates in found]
        return learning_rates(optimizer, None, updates)

    def peaks(self) -> list[list[float]]:
        """By optimizer and group, the highest learning rate."""
        return [[max(rates) for rates in groups] for groups in self.rates]

    @cached_property
    def warmup(self) -> int | None:
        """Updates until the first optimizer's highest learning rate is nearly reached, from the beginning of the run.

        None where the run is resumed, or has no learning rate.
        """
        if self.trainer.global_step or not self.rates or not self.rates[0]:
            return None
        rates = max(self.rates[0], key=max)
        if max(rates) == 0:
            return None
        reached = next((i for i, rate in enumerate(rates) if rate >= 0.99 * max(rates)), 0)
        return self.updates[reached]

    # ---- the data

    @cached_property
    def train_loaders(self) -> list[Any]:
        """Training loaders."""
        combined = self.trainer.fit_loop._combined_loader
        return [] if combined is None else list(combined.flattened)

    @cached_property
    def val_loaders(self) -> list[Any]:
        """Validation loaders."""
        combined = self.trainer.fit_loop.epoch_loop.val_loop._combined_loader
        return [] if combined is None else list(combined.flattened)


def labels_of(batch: Any) -> Tensor | None:
    """What a batch, or a sample, is learned towards, where it has a usual name or place."""
    if hasattr(batch, "keys"):
        return next((batch[key] for key in _LABELS if key in batch and isinstance(batch[key], Tensor)), None)
    if isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    return None
