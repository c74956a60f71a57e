"""Protections from the package index, where they are installed: ``pip install --no-deps stabilityguard``."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from overhead_fits import quiet
from torch import Tensor
from torch.optim import Optimizer


class Counts(torch.optim.SGD):
    """Stands in for the real optimizer, and knows whether it would have stepped."""

    stepped = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Count."""
        self.stepped += 1


class StabilityGuard(Callback):
    """stabilityguard's optimizer wrapper at its defaults: where it would not step, neither does the run."""

    def __init__(self) -> None:
        self.actions: list[list[Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap."""
        import stabilityguard

        self.optimizer = Counts([torch.zeros(1)], lr=0.0)
        self.guard = stabilityguard.GuardedOptimizer(
            self.optimizer, pl_module, log_dir=trainer.default_root_dir, verbose=False
        )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss."""
        self.loss = loss.item()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Ask."""
        before = self.optimizer.stepped
        with quiet():
            self.guard.step(loss=self.loss)
        if self.optimizer.stepped == before:
            self.actions.append([trainer.global_step, "skip"])
            for parameter in pl_module.parameters():
                parameter.grad = None


def installed_peers() -> dict[str, Callable[[], list[Callback]]]:
    """Those that can be imported, by name."""
    return {"stabilityguard": lambda: [StabilityGuard()]} if find_spec("stabilityguard") else {}
