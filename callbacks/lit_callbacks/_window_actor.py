"""The base of actors that look at the whole accumulation window before a step is made."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_callbacks._actor import Actor
from lit_callbacks._errors import SetupError
from lit_callbacks._window import Window


class WindowActor(Actor):
    """Keeps the window under way, and lets the shared facts see its losses.

    Manual optimization is refused: there nobody can tell which losses belong to which optimizer step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._window: Window | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_window": None}

    @property
    def window(self) -> Window:
        """The accumulation window under way; during fit only."""
        assert self._window is not None
        return self._window

    def keeps_batches(self, trainer: Trainer) -> bool:
        """Whether to hold on to the batches of a window until the next."""
        return True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse manual optimization."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not pl_module.automatic_optimization:
            raise SetupError(
                f"{type(self).__name__} needs automatic optimization: in manual optimization it cannot tell which "
                "losses belong to which optimizer step. Do without it, or let Lightning optimize."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the module now that a checkpoint has been loaded."""
        self._window = Window(trainer, pl_module, self.keeps_batches(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch, and what its forward pass is about to change."""
        self.window.start_batch(trainer, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the shared facts see the loss, and remember which batch it belongs to."""
        self.window.record_loss(self, trainer, loss)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the batches."""
        super().teardown(trainer, pl_module, stage)
        self._window = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the batches."""
        super().on_exception(trainer, pl_module, exception)
        self._window = None
