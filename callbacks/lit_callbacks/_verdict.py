"""Where the verdict on a run is shown: as columns of a W&B run, and as text in TensorBoard."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lit_callbacks._pictures import logger_kind
from lit_callbacks._wandb_runs import wandb_runs
from lit_callbacks.health import Diagnosis


def show_verdict(trainer: Trainer, found: Diagnosis, counters: Mapping[str, float]) -> None:
    """Show it in every logger that can, with what recovery has counted."""
    columns = {"verdict": found.verdict, "culprit": found.culprit, "first_warning_step": found.first_warning_step}
    for run in wandb_runs(trainer):
        run.summary.update({f"health/{name}": value for name, value in (columns | dict(counters)).items()})
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        if logger_kind(logger) == "TensorBoardLogger":
            logger.experiment.add_text("health/verdict", "  \n".join(found.sentences), trainer.global_step)
