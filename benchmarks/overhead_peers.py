"""Other people's monitoring tools, each as a callback that runs it the way its documentation says."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import grad_norm
from overhead_fits import Alternate
from torch import Tensor

EVERY = 50
"""The cadence that the peers which have one are given in the last column."""


class LightningGradNorm(Alternate):
    """Lightning's function, logged the way its documentation says or read by the host."""

    def __init__(self, log: bool) -> None:
        self.log_dict_too = log

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Norms of all gradients."""
        if self.on:
            norms = grad_norm(pl_module, norm_type=2)
            if self.log_dict_too:
                pl_module.log_dict(norms)
            else:
                torch.stack([torch.as_tensor(norm) for norm in norms.values()]).tolist()


class WandbWatch(Callback):
    """``wandb.watch``, offline, of the model inside the module.

    Of the module itself parameters would never be seen: wandb looks at them after ``forward``, and Lightning calls
    ``training_step``.
    """

    def __init__(self, what: str, folder: str) -> None:
        self.what, self.folder = what, folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch."""
        import wandb

        settings = wandb.Settings(silent=True, disable_git=True, disable_code=True)
        self.run = wandb.init(project="overhead", mode="offline", dir=self.folder, settings=settings)
        self.run.watch(pl_module.model, log=self.what, log_freq=2)

    def on_train_batch_end(self, *args: Any) -> None:
        """What has been gathered goes out with the next log."""
        self.run.log({"loss": 1.0})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self.run.unwatch(pl_module.model)
        self.run.finish()


class TrainScope(Callback):
    """trainscope as its README has it: ``step`` between backward and the optimizer's step."""

    def __init__(self, folder: str, **config: Any) -> None:
        self.folder, self.config = folder, config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach."""
        import trainscope
        from trainscope.core.config import TrainScopeConfig

        config = TrainScopeConfig(run_dir=self.folder, trace_every_n_steps=2, **self.config)
        self.scope = trainscope.TrainScope(pl_module, trainer.optimizers[0], config).attach()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss."""
        self.loss = loss

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Record."""
        self.scope.step(self.loss.item())

    def on_fit_end(self, *args: Any) -> None:
        """Detach."""
        self.scope.detach()


class StabilityGuard(Alternate):
    """stabilityguard's optimizer wrapper, around an optimizer with nothing to do: what is left is its own work."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def switch_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap."""
        import stabilityguard

        nothing = torch.optim.SGD([torch.zeros(1)], lr=0.0)
        self.guard = stabilityguard.GuardedOptimizer(nothing, pl_module, log_dir=self.folder, verbose=False)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Look at the gradients."""
        if self.on:
            self.guard.step(loss=self.loss.item())

    def switch_off(self) -> None:
        """Unwrap."""
        self.guard.close()


class GradLens(Alternate):
    """gradlens: the norm of each parameter's gradient, and zeros after ``nn.ReLU``, of which there are none here."""

    def switch_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch."""
        import gradlens

        self.monitor = gradlens.watch(pl_module)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Record."""
        if self.on:
            self.monitor.log(loss=self.loss.item())

    def switch_off(self) -> None:
        """Stop."""
        self.monitor.close()


@dataclass(frozen=True)
class Peer:
    """Somebody else's tool.

    Args:
        name: What its row is called.
        package: What must be importable.
        make: From a folder for its files to the callback that runs it.
        every: Its cadence for the last column; 1 where it has none to set.
        install: What would install it.
        timed: Whether all of its time is in the callback's hooks.
        between: The peer that tells what the steps between measured ones cost, if that is not nothing.
    """

    name: str
    package: str
    make: Callable[[str], Callback]
    every: int
    install: str = ""
    timed: bool = False
    between: str = ""

    @property
    def installed(self) -> bool:
        """Whether it can be run."""
        return importlib.util.find_spec(self.package) is not None


PEERS = [
    Peer("Lightning's `grad_norm`, one read", "lightning", lambda _: LightningGradNorm(log=False), EVERY, timed=True),
    Peer("Lightning's `grad_norm` and `log_dict`", "lightning", lambda _: LightningGradNorm(log=True), 1, timed=True),
    Peer(
        '`wandb.watch(log="gradients")`',
        "wandb",
        lambda folder: WandbWatch("gradients", folder),
        EVERY,
        "pip install wandb",
    ),
    Peer('`wandb.watch(log="all")`', "wandb", lambda folder: WandbWatch("all", folder), EVERY, "pip install wandb"),
    Peer(
        "trainscope without activations",
        "trainscope",
        lambda folder: TrainScope(folder, activation_metrics_every_n_steps=1000),
        1,
        "pip install trainscope",
    ),
    Peer(
        "trainscope, activations at its default",
        "trainscope",
        lambda folder: TrainScope(folder, activation_metrics_every_n_steps=2),
        5,
        "pip install trainscope",
        between="trainscope without activations",
    ),
    Peer("stabilityguard", "stabilityguard", StabilityGuard, 1, "pip install stabilityguard"),
    Peer("gradlens", "gradlens", lambda _: GradLens(), 1, "pip install gradlens"),
]
