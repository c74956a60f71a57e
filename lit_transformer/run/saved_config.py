"""The configuration, kept with the run, in W&B and in every checkpoint."""

from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_transformer.run.folder import RunFolder


class SavedConfig(Callback):
    """Write ``config.yaml`` into the run folder, and the same into the W&B run and each checkpoint.

    It is what ``--config`` takes. The name of the run, the checkpoint it was resumed from, and the permission to change
    the configuration for that once are left out, so that it can start another run. When a resumed run has another
    configuration, the earlier one is kept beside it.

    Args:
        run: The run's folder.
        config: The configuration as plain data.
    """

    def __init__(self, run: RunFolder, config: dict[str, Any]) -> None:
        self.run = run
        once = {"run", "ckpt_path", "config", "allow_config_change"}
        self.config = {key: value for key, value in config.items() if key not in once}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, and tell W&B."""
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(self.config)
        text = yaml.safe_dump(self.config, sort_keys=False)
        if self.run.config.exists() and self.run.config.read_text(encoding="utf-8") != text:
            self.run.config.rename(self.run.path / f"config-until-step-{trainer.global_step}.yaml")
        self.run.config.write_text(text, encoding="utf-8")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put it into the checkpoint, which then needs nothing else to be evaluated."""
        checkpoint["config"] = self.config
