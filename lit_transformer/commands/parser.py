"""The parser of commands that train and evaluate nothing."""

from typing import Any

from jsonargparse import ArgumentParser

from lit_transformer.errors import UsageError
from lit_transformer.run.config_errors import explain


class CommandParser(ArgumentParser):
    """Explains what is wrong with the words, as ``fit`` does."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise instead of leaving the process.

        Raises:
            UsageError: Always.
        """
        raise UsageError(explain(message, [action.dest for action in self._actions])) from ex

    def add_checkpoint_arguments(self, default: str | None = None) -> None:
        """Which checkpoint, of which run."""
        self.add_argument("--ckpt_path", type=str, default=default, help="A checkpoint; or best or last of --run.")
        self.add_argument("--run", type=str | None, default=None, help="Name of a run.")
        self.add_argument("--root", type=str, default="runs", help="Where the runs are.")
