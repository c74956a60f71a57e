"""The last checkpoint: at the end, and on Ctrl-C between two steps."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LastCheckpoint(Callback):
    """Save ``last.ckpt`` at the end of training, and on Ctrl-C: the first finishes the step, the second stops at once.

    A KeyboardInterrupt in the middle of an optimizer step leaves some weights updated and others not, and a checkpoint
    written then holds that mixture. Lightning's ModelCheckpoint leaves the steps since its last save out of
    ``last.ckpt`` when training ends.

    Args:
        path: Where to save.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._requested = self._at_boundary = False
        self._saved_at = -1
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C, after Lightning has noted whose it was.

        Outside the main thread Python does not allow it, and all stays as it was.
        """
        try:
            self._previous = signal.signal(signal.SIGINT, self._request)
        except ValueError:
            self._previous = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after the last step, or stop here, unless gradients have been accumulated that are not stepped yet."""
        self._at_boundary = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if self._requested and self._at_boundary:
            self._save(trainer)
            raise KeyboardInterrupt
        last_of_epochs = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.global_step == trainer.max_steps or last_of_epochs:
            # Not in on_train_end: from there a resumed run counts its logged steps one too far (Lightning 2.6.6).
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if training ended early, by another callback's decision."""
        if self._saved_at != trainer.global_step:
            self._save(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Validation changes no weights: stop here too, unless it runs in the middle of an accumulation."""
        if self._requested and self._at_boundary:
            self._save(trainer)
            raise KeyboardInterrupt

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._restore()

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved_at = trainer.global_step

    def _request(self, signum: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        print("\nStopping after this step; press Ctrl-C again to stop at once.", flush=True)

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
