"""The hooks of ``validate`` and ``test`` as one set; a validation that is part of a fit calls none of them."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class EvaluationHooks(Callback):
    """A callback that treats ``validate`` and ``test`` alike."""

    def evaluation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A ``validate`` or ``test`` begins."""

    def evaluation_batch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A batch has come."""

    def evaluation_batch_end(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """A batch is done."""

    def evaluation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All loaders are done; values can be logged."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, unless in a fit."""
        if trainer.state.fn == "validate":
            self.evaluation_start(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Pass on, unless in a fit."""
        if trainer.state.fn == "validate":
            self.evaluation_batch_start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Pass on, unless in a fit."""
        if trainer.state.fn == "validate":
            self.evaluation_batch_end(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass on, unless in a fit."""
        if trainer.state.fn == "validate":
            self.evaluation_epoch_end(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self.evaluation_start(trainer, pl_module)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Pass on."""
        self.evaluation_batch_start(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Pass on."""
        self.evaluation_batch_end(trainer, pl_module, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pass on."""
        self.evaluation_epoch_end(trainer, pl_module)
