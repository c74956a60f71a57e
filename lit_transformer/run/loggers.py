"""Where metrics go: the run folder always, W&B and TensorBoard when asked."""

import os
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_transformer.errors import UsageError
from lit_transformer.run.folder import RunFolder
from lit_transformer.run.metrics_file import MetricsFile
from lit_transformer.run.wandb_server import why_offline


def make_loggers(
    run: RunFolder,
    metrics: MetricsFile,
    wandb: bool,
    tensorboard: bool,
    configured: Any,
    secret_words: bool = False,
) -> list[Logger]:
    """The metrics file, what the two switches ask for, and what the configuration lists itself.

    Args:
        run: The run's folder.
        metrics: The metrics file.
        wandb: Log to W&B, as the same W&B run when a run is resumed.
        tensorboard: Log to TensorBoard.
        configured: ``trainer.logger`` of the configuration.
        secret_words: Whether the command line holds a secret: W&B, which keeps it, is then told nothing of the process.

    Raises:
        UsageError: If one is asked for and not installed.
    """
    loggers: list[Logger] = [metrics]
    make: dict[str, Callable[[], Logger]] = {}
    if wandb:
        make["wandb"] = partial(_wandb, run, secret_words)
    if tensorboard:
        make["tensorboard"] = partial(TensorBoardLogger, run.path, name="tensorboard", version="")
    for name, logger in make.items():
        try:
            loggers.append(logger())
        except ModuleNotFoundError:
            raise UsageError(f"{name} is not installed; pip install {name}, or leave --{name} out") from None
    if isinstance(configured, Logger):
        loggers.append(configured)
    elif isinstance(configured, list):
        loggers += configured
    return loggers


def _wandb(run: RunFolder, secret_words: bool) -> WandbLogger:
    known = run.wandb_id.exists()
    reason = why_offline()
    if reason is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print(
            f"W&B: this run is kept offline, as {reason}. To send it later: wandb sync {run.path}/wandb/offline-run-*"
        )
    logger = WandbLogger(
        name=run.path.name,
        save_dir=run.path.resolve(),  # the process that writes may have been started in another folder
        id=run.wandb_id.read_text(encoding="utf-8") if known else secrets.token_hex(4),
        project=os.environ.get("WANDB_PROJECT", "lit-transformer"),
        offline=reason is not None,
        resume="allow",  # offline as well: `wandb sync` then appends what a resumed run has written
        settings={"x_disable_meta": True} if secret_words else None,
    )
    if not known and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        run.wandb_id.write_text(str(logger.version), encoding="utf-8")
    return logger
