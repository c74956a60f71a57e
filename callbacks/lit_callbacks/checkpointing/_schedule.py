"""When is a checkpoint saved? At moments from which a run can go on exactly."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_callbacks.checkpointing._writer import Place


class SaveSchedule(ModelCheckpoint):
    """The schedule of a ``ModelCheckpoint``, in which no save comes at a moment that Lightning cannot go on from.

    Lightning 2.6.6 saves in ``on_train_batch_end``. From a checkpoint saved there it leaves out a validation that was
    due, and from one saved on an epoch's last batch the whole next epoch where the loader is stateful. So a save in
    front of a validation waits for its end, one at an epoch's end waits for the next epoch's start, and one in the
    middle of an accumulation window for the window's end.

    A subclass saves, in :meth:`_save_wanted`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._wanted: dict[str, Tensor] | None = None
        self._place: Place = "between_steps"

    def _save_wanted(self, trainer: Trainer, at_last: bool = False) -> None:
        """Save what is due, if anything is."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; in front of a validation or at an epoch's end, later."""
        loop = trainer.fit_loop
        if loop._should_accumulate() or self._should_skip_saving_checkpoint(trainer):
            return
        if self._is_time(trainer):
            self._want(trainer)
        if self._wanted is None or loop.epoch_loop._num_ready_batches_reached():
            return
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
            self._save_wanted(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what has waited for the metrics, or is due after each validation."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        if self._wanted is not None:
            self._want(trainer)
        if not self._should_save_on_train_epoch_end(trainer) and self._is_epoch(trainer):
            self._want(trainer)
        loop = trainer.fit_loop
        if not loop.epoch_loop._num_ready_batches_reached() and not loop._should_accumulate():
            self._save_wanted(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that a save is due; what is logged for the epoch has not been logged yet."""
        skip = self._should_skip_saving_checkpoint(trainer)
        if not skip and self._should_save_on_train_epoch_end(trainer) and self._is_epoch(trainer):
            self._want(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was due at the end of the epoch before."""
        self._place = "epoch_start"
        self._save_wanted(trainer)
        self._place = "between_steps"

    def _is_time(self, trainer: Trainer) -> bool:
        if self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            return True
        if self.monitor == "step" and trainer.global_step == trainer.max_steps:
            return True  # here and not in on_train_end, where Lightning takes the epoch for done
        if self._train_time_interval is None or self._last_time_checked is None:
            return False
        over = time.monotonic() - self._last_time_checked >= self._train_time_interval.total_seconds()
        if over := bool(trainer.strategy.broadcast(over)):
            self._last_time_checked = time.monotonic()
        return over

    def _is_epoch(self, trainer: Trainer) -> bool:
        return self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def _want(self, trainer: Trainer) -> None:
        self._wanted = self._monitor_candidates(trainer)
