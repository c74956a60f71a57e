"""The base of observers that look into the forward pass."""

from abc import abstractmethod
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_callbacks._deepspeed import step_follows
from lit_callbacks._evaluation import EvaluationHooks
from lit_callbacks._intercept import Listener, interceptor_of
from lit_callbacks._observer import Observer
from lit_callbacks._ranks import Measurement


class ForwardObserver(Observer, Listener, EvaluationHooks):
    """Listens to every forward pass of a measured optimizer step, and of every batch of ``validate`` and ``test``.

    In manual optimization it listens until the first optimizer step of a batch. Activation checkpointing runs a forward
    pass again during backward; nothing listens then.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self._measuring = False

    @abstractmethod
    def collected(self, trainer: Trainer) -> Measurement:
        """What has been seen on this rank since :meth:`discard`."""

    @abstractmethod
    def discard(self) -> None:
        """Forget what has been seen."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Due? Listen."""
        if not self._measuring and not self.off and self.cadence.due(trainer.global_step):
            self._measuring = True
            self.discard()
        if self._measuring:
            self._listen(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over."""
        if self._measuring:
            interceptor_of(trainer).remove(self)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In manual optimization another forward pass may follow in the same batch."""
        if self._measuring and not pl_module.automatic_optimization:
            self._listen(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Report what was seen in the step's forward passes."""
        if self._measuring and step_follows(trainer):
            self._measuring = False
            interceptor_of(trainer).remove(self)
            self.report(trainer, pl_module, trainer.global_step, lambda: self.collected(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch without a backward pass ends here."""
        if self._measuring:
            interceptor_of(trainer).remove(self)

    def _listen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.attempt(interceptor_of(trainer).add, self, pl_module)

    def evaluation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin empty."""
        self.discard()

    def evaluation_batch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen(trainer, pl_module)

    def evaluation_batch_end(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """The forward pass is over."""
        interceptor_of(trainer).remove(self)

    def evaluation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what was seen in the whole loader."""
        self.report(trainer, pl_module, trainer.global_step, lambda: self.collected(trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no more."""
        super().teardown(trainer, pl_module, stage)
        self._stop(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        super().on_exception(trainer, pl_module, exception)
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        self._measuring = False
        interceptor_of(trainer).remove(self)
        self.discard()
