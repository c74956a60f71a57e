"""Predictions as a file."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_transformer.batch_geometry import data_parallel_size


class PredictionsFile(Callback):
    """Write what ``predict_step`` returns, a dict of tensors or lists with one entry per sample, as CSV.

    Args:
        path: The file; ranks with other samples write ``<name>-rank<n>.csv``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writes = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the file anew."""
        sharing = trainer.world_size // data_parallel_size(trainer)  # ranks that have the same samples
        part, place = divmod(trainer.global_rank, sharing)
        self._writes = place == 0
        if not self._writes:
            return
        if part > 0:
            self.path = self.path.with_stem(f"{self.path.stem}-rank{part}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Append the rows of a batch."""
        if not self._writes:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(outputs)
            columns = [values if isinstance(values, list) else values.tolist() for values in outputs.values()]
            writer.writerows(zip(*columns, strict=True))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where it is."""
        if self._writes:
            print(f"Predictions: {self.path}")
