"""Where metrics go: the run folder always, W&B and TensorBoard when asked."""

import netrc
import os
import secrets
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from lit_transformer.errors import UsageError
from lit_transformer.run.folder import RunFolder
from lit_transformer.run.metrics_file import MetricsFile

_WANDB_HOST = "api.wandb.ai"


def make_loggers(run: RunFolder, metrics: MetricsFile, wandb: bool, tensorboard: bool, configured: Any) -> list[Logger]:
    """The metrics file, what the two switches ask for, and what the configuration lists itself.

    Args:
        run: The run's folder.
        metrics: The metrics file.
        wandb: Log to W&B, as the same W&B run when a run is resumed.
        tensorboard: Log to TensorBoard.
        configured: ``trainer.logger`` of the configuration.

    Raises:
        UsageError: If TensorBoard is asked for and not installed.
    """
    loggers: list[Logger] = [metrics]
    if wandb:
        loggers.append(_wandb(run))
    if tensorboard:
        try:
            loggers.append(TensorBoardLogger(run.path, name="tensorboard", version=""))
        except ModuleNotFoundError:
            raise UsageError(
                "TensorBoard is not installed; pip install tensorboard, or leave --tensorboard out"
            ) from None
    if isinstance(configured, Logger):
        loggers.append(configured)
    elif isinstance(configured, list):
        loggers += configured
    return loggers


def _wandb(run: RunFolder) -> WandbLogger:
    if not run.wandb_id.exists():
        run.wandb_id.write_text(secrets.token_hex(4), encoding="utf-8")
    offline = os.environ.get("WANDB_MODE") == "offline" or not _has_wandb_key()
    return WandbLogger(
        name=run.path.name,
        save_dir=run.path,
        id=run.wandb_id.read_text(encoding="utf-8"),
        project=os.environ.get("WANDB_PROJECT", "lit-transformer"),
        offline=offline,
        resume=None if offline else "allow",
    )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(os.environ.get("WANDB_BASE_URL", _WANDB_HOST)) is not None
    except (OSError, netrc.NetrcParseError):
        return False
