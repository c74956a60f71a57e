"""``dashboard``: the saved W&B workspace for the runs of a project."""

import os
from typing import Any

from lit_callbacks import workspace
from lit_transformer.commands.parser import CommandParser
from lit_transformer.errors import UsageError
from lit_transformer.run.wandb_server import why_offline


def main(words: list[str]) -> None:
    """Parse the words after ``dashboard``, save the workspace in W&B, and print where it is.

    Raises:
        UsageError: If something is missing: who it is for, wandb-workspaces, an API key, or the network.
    """
    parser = CommandParser(
        prog="dashboard",
        description="Save a W&B workspace with sections for loss, gradients, attention, neurons, recovery, throughput "
        "and data.",
    )
    entity, project = os.environ.get("WANDB_ENTITY"), os.environ.get("WANDB_PROJECT", "lit-transformer")
    parser.add_argument("--entity", type=str | None, default=entity, help="W&B user or team; default WANDB_ENTITY.")
    parser.add_argument("--project", type=str, default=project, help="The runs' project; default WANDB_PROJECT.")
    parser.add_argument("--name", type=str, default="Training stability", help="What the workspace is called.")
    options = parser.parse_args(words)
    if options.entity is None:
        raise UsageError("dashboard needs the W&B user or team that it is for: --entity NAME, or set WANDB_ENTITY")
    try:
        made: Any = workspace(options.entity, options.project, options.name)
        reason = why_offline()
    except ModuleNotFoundError:
        raise UsageError("wandb-workspaces is not installed (extra dashboard): pip install wandb-workspaces") from None
    if reason is not None:
        raise UsageError(f"a workspace is kept in W&B, which cannot be asked: {reason}")
    try:
        made.save()
    except Exception as error:  # of wandb, requests and GraphQL: each has its own
        raise UsageError(f"W&B did not take the workspace: {error}") from error
    print(f"Workspace {options.name!r} with {len(made.sections)} sections: {made.url}")
