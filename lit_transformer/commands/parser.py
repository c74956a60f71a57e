"""The parsers of the command line: what is wrong with the words, in one sentence."""

import re
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lit_transformer.errors import UsageError
from lit_transformer.run.config_errors import explain


class OneParagraphParser(LightningArgumentParser):
    """Of ``fit`` and its like; errors have the nearest right name, instead of pages of usage."""

    def parse_args(self, args: Any = None, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """``null`` also for ``--model.init_args.config.KEY``, which comes here as the word None (jsonargparse 4.53)."""
        return super().parse_args(args and [re.sub(r"^(--[\w.]+)=None$", r"\1=null", word) for word in args], **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what the command line prints."""
        subcommands = getattr(self._subcommands_action, "choices", None) or {}
        parsers = [self, *subcommands.values()]
        raise UsageError(explain(message, [action.dest for parser in parsers for action in parser._actions])) from ex


class CommandParser(ArgumentParser):
    """Of commands that train and evaluate nothing; explains what is wrong as ``fit`` does."""

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
