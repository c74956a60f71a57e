"""``consolidate``: a checkpoint that a sharded run saved in parts, as one file that any strategy loads."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.load import _load_distributed_checkpoint

from lit_callbacks.checkpointing import AtomicCheckpointIO
from lit_transformer.commands import zero_parts
from lit_transformer.commands.checkpoints import chosen, is_in_parts, load_checkpoint
from lit_transformer.commands.parser import CommandParser
from lit_transformer.errors import UsageError


def main(words: list[str]) -> None:
    """Parse the words after ``consolidate``, and write the file.

    Raises:
        UsageError: For anything wrong in them, or in the checkpoint.
    """
    parser = CommandParser(
        prog="consolidate", description="Write a checkpoint that a sharded run saved in parts as one file."
    )
    parser.add_checkpoint_arguments(default="last")
    parser.add_argument("--to", type=str | None, default=None, help="The new file.")
    options = parser.parse_args(words)
    if options.to is None:
        raise UsageError("consolidate needs a file to write to: --to FILE.ckpt")
    if (to := Path(options.to)).exists():
        raise UsageError(f"{to} exists already; name a new file by --to")
    path = chosen(Path(options.root), options.run, options.ckpt_path)
    load_checkpoint(path, weights=False)
    if not is_in_parts(path):
        raise UsageError(f"{path} is one file already")
    AtomicCheckpointIO().save_checkpoint(whole(path), to)
    print(f"Consolidated {path} to {to}.")


def whole(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint in parts, as one that was saved by a single process.

    Torch reads the parts with pickle: of a checkpoint that is trusted only.

    Cost: all of it in memory.
    """
    if zero_parts.is_of_deepspeed(folder):
        return zero_parts.whole(folder)
    checkpoint = _load_distributed_checkpoint(folder)
    if "model" in checkpoint:  # as FSDP1 calls it
        checkpoint["state_dict"] = checkpoint.pop("model")
    names = sorted(name for name in checkpoint if name.startswith("optimizer_") and name[10:].isdigit())
    if names:
        checkpoint["optimizer_states"] = [_by_number(checkpoint.pop(name)) for name in names]
    return checkpoint


def _by_number(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with parameters numbered, as an optimizer's own is, in place of named."""
    numbers: dict[str, int] = {}
    groups = []
    for group in optimizer["param_groups"]:
        numbers |= {name: len(numbers) + i for i, name in enumerate(group["params"])}
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    return {"state": {numbers[name]: state for name, state in optimizer["state"].items()}, "param_groups": groups}
