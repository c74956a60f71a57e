"""``export``: the weights of a checkpoint for others, as safetensors with digests."""

from pathlib import Path

from lit_callbacks import CheckpointError
from lit_callbacks.checkpointing import export_weights, load_exported, local
from lit_transformer.commands.checkpoints import locate
from lit_transformer.commands.parser import CommandParser
from lit_transformer.errors import UsageError
from lit_transformer.nn import TransformerConfig
from lit_transformer.tasks import LitCausalLM


def main(words: list[str]) -> None:
    """Parse the words after ``export``, and write the folder.

    Raises:
        UsageError: For anything wrong in them, or in the checkpoint.
    """
    parser = CommandParser(prog="export", description="Write the weights of a checkpoint as safetensors with digests.")
    parser.add_checkpoint_arguments(default="best")
    parser.add_argument("--to", type=str | None, default=None, help="The new folder.")
    options = parser.parse_args(words)
    if options.to is None:
        raise UsageError("export needs a folder to write to: --to FOLDER")
    try:
        if options.ckpt_path in ("best", "last"):
            path = locate(Path(options.root), options.run, options.ckpt_path)
        else:
            path = local(options.ckpt_path)
        export_weights(path, Path(options.to))
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    print(f"Exported {path} to {options.to}: model.safetensors, config.json, digests.json")


def load_exported_model(folder: str | Path) -> LitCausalLM:
    """The language model in an exported folder, for evaluation.

    Only the shape is taken from ``config.json``: no class is imported because a file names it.

    Raises:
        CheckpointError: If the folder is not a whole export of a language model.
    """
    weights, settings = load_exported(Path(folder))
    try:
        model = LitCausalLM(TransformerConfig(**settings["config"]))
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is not an export of a language model: {error}") from None
    return model.eval()
