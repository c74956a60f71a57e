"""Everything that ``fit`` would train with, for commands that only look at it."""

import tempfile
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lit_transformer.commands.training import TrainingCLI, quieten


class PreparedCLI(TrainingCLI):
    """Model, data and trainer from the words of ``fit``; no run folder, no loggers, no checkpoints.

    Args:
        words: The words after the command.
        add_options: Adds the options of the command itself, which are then in ``settings``.
        visitor: A callback that looks at the run, or changes it.
        keep_defaults: Have the default callbacks beside it.
    """

    def __init__(
        self,
        words: list[str],
        add_options: Callable[[LightningArgumentParser], None],
        visitor: Callback,
        keep_defaults: bool = False,
    ) -> None:
        quieten()
        self.add_options, self.visitor, self.keep_defaults = add_options, visitor, keep_defaults
        super().__init__(["fit", *words])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of fit, and the command's own."""
        super().add_arguments_to_parser(parser)
        self.add_options(parser)

    def _prepare_run(self, trainer: dict[str, Any]) -> list[Callback]:
        trainer |= {"logger": False, "enable_checkpointing": False}
        return []

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        return super()._instantiate_trainer(config, [*(callbacks if self.keep_defaults else []), self.visitor])

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: the command decides."""

    def start(self) -> None:
        """Train, with the errors of ``fit``; what callbacks write is thrown away."""
        with tempfile.TemporaryDirectory(prefix="lit-transformer-") as scratch:
            self.trainer._default_root_dir = scratch  # type: ignore[attr-defined]
            super()._run_subcommand("fit")


class Enough(Exception):
    """What was wanted has been seen."""


class Visit(Callback):
    """Look at what has been set up, right before the first step, and go no further."""

    def __init__(self, look: Callable[[Trainer, LightningModule], None]) -> None:
        self.look = look

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look."""
        self.look(trainer, pl_module)
        raise Enough
