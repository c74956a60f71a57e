"""Progress of the whole run: step, loss, learning rate, gradient norm, tokens per second, what recovery has done."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lit_transformer.batch_geometry import data_parallel_size
from lit_transformer.errors import UsageError
from lit_transformer.optim.total_steps import total_steps

_SECONDS_BETWEEN_REFRESHES = 0.2
_SECONDS_BETWEEN_LINES = 10.0
_OF_CALLBACKS = (
    ("grad norm", "grad_norm/total", ".2f"),
    ("skipped", "loss_spike/skipped_steps", ".0f"),
    ("rolled back", "loss_spike/rollbacks", ".0f"),
)
"""What to call a number that a callback has measured last, its key, and its format."""


class RunProgress(TQDMProgressBar):
    """A bar over the optimizer steps of the run; where the output is no terminal, a line every ten seconds.

    Cost: a clock reading per batch; the numbers are fetched from the device when they are shown.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_terminal = sys.stdout.isatty()
        self._shown_at = 0.0
        self._batches = 0
        self._total: int | None = None
        if not self._is_terminal:
            self.disable()

    def enable(self) -> None:
        """Lightning enables the bar on rank zero; without a terminal there is only text."""
        if self._is_terminal:
            super().enable()

    def init_train_tqdm(self) -> Tqdm:
        """A bar over optimizer steps, which goes on where a resumed run stands."""
        bar = super().init_train_tqdm()
        bar.total, bar.unit = self._total, "step"
        bar.initial = bar.n = self.trainer.global_step
        return bar

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar."""
        try:
            self._total = total_steps(trainer)
        except UsageError:
            self._total = None  # a run without an end, by a schedule that needs none
        self._start_clock()
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Name the epoch."""
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the state if it is time."""
        self._batches += 1
        elapsed = time.monotonic() - self._shown_at
        last = trainer.global_step == self._total
        if elapsed < (_SECONDS_BETWEEN_REFRESHES if self._is_terminal else _SECONDS_BETWEEN_LINES) and not last:
            return
        state = self._state(trainer, pl_module, elapsed)
        if self._is_terminal:
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.set_postfix(state)
        elif trainer.is_global_zero:
            numbers = "  ".join(f"{name} {value}" for name, value in state.items())
            of_total = f"/{self._total}" if self._total is not None else ""
            print(f"step {trainer.global_step}{of_total}  {numbers}", flush=True)
        self._start_clock()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The bar goes on through the epochs."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation does not count into the speed of training."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            loss = trainer.callback_metrics.get("val/loss")
            if loss is not None and not self._is_terminal and trainer.is_global_zero:
                print(f"step {trainer.global_step}  validation loss {float(loss):.4f}", flush=True)
            self._start_clock()

    def _start_clock(self) -> None:
        self._batches, self._shown_at = 0, time.monotonic()

    def _state(self, trainer: Trainer, pl_module: LightningModule, elapsed: float) -> dict[str, str]:
        state: dict[str, str] = {}
        for name, key in (("loss", "train/loss"), ("val", "val/loss")):
            if key in trainer.callback_metrics:
                state[name] = f"{float(trainer.callback_metrics[key]):.3f}"
        if trainer.optimizers:
            state["lr"] = f"{trainer.optimizers[0].param_groups[0]['lr']:.1e}"
        for name, key, form in _OF_CALLBACKS:
            if key in trainer.callback_metrics:
                state[name] = format(float(trainer.callback_metrics[key]), form)
        tokens = getattr(trainer.datamodule, "tokens_per_batch", None)  # type: ignore[attr-defined]
        if tokens is not None and elapsed > 0:
            state["tokens/s"] = f"{self._batches * tokens * data_parallel_size(trainer) / elapsed:,.0f}"
        return state
