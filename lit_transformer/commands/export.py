"""``export``: the weights of a checkpoint for others: safetensors with digests, or what Hugging Face loads."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_callbacks import CheckpointError
from lit_callbacks.checkpointing import export_weights, load_exported
from lit_transformer.commands.checkpoints import chosen, load_checkpoint
from lit_transformer.commands.parser import CommandParser
from lit_transformer.convert import save_hugging_face
from lit_transformer.data import LanguageModelingData, MaskedLanguageModelingData
from lit_transformer.data.tokenizer import ByteTokenizer
from lit_transformer.errors import UsageError
from lit_transformer.nn import MaskedTransformer, Transformer, TransformerConfig
from lit_transformer.tasks import LitCausalLM, LitPretrained

_OURS_ONLY = "what --hugging_face converts are language models of ours"


def main(words: list[str]) -> None:
    """Parse the words after ``export``, and write the folder.

    Raises:
        UsageError: For anything wrong in them, or in the checkpoint.
    """
    parser = CommandParser(
        prog="export",
        description="Write the weights of a checkpoint: safetensors with digests, or what Hugging Face loads.",
    )
    parser.add_checkpoint_arguments(default="best")
    parser.add_argument("--to", type=str | None, default=None, help="The new folder.")
    parser.add_argument(
        "--hugging_face",
        type=bool,
        default=False,
        help="Of a model of ours: as GPT-2, LLaMA or BERT, if it is like one.",
    )
    options = parser.parse_args(words)
    if options.to is None:
        raise UsageError("export needs a folder to write to: --to FOLDER")
    try:
        path = chosen(Path(options.root), options.run, options.ckpt_path)
        checkpoint = load_checkpoint(path)
        if "architecture" in checkpoint.get("hyper_parameters", {}):
            export_pretrained(checkpoint, Path(options.to))
        elif options.hugging_face:
            export_as_theirs(checkpoint, Path(options.to))
        else:
            export_weights(path, Path(options.to))
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    written = ", ".join(sorted(file.name for file in Path(options.to).iterdir()))
    print(f"Exported {path} to {options.to}: {written}")


def export_pretrained(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a fine-tuned model, LoRA merged into it, and its tokenizer as Hugging Face loads them.

    The folder appears complete or not at all. The tokenizer is the one that the run's configuration names, if it is
    still there.

    Args:
        checkpoint: The contents of a checkpoint of :class:`~lit_transformer.LitPretrained`.
        folder: A new folder.

    Raises:
        UsageError: If the folder exists, or the weights do not fit.
    """
    settings = checkpoint["hyper_parameters"]
    kept = {name: settings[name] for name in ("architecture", "task", "multi_label", "lora")}
    module = LitPretrained(**kept)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UsageError(f"the checkpoint's weights do not fit its configuration: {error}") from None
    with _appearing(folder) as whole:
        module.save_pretrained(whole)
        _save_tokenizer(checkpoint.get("config", {}), whole)


def export_as_theirs(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a language model of ours as the GPT-2, LLaMA or BERT that it is, and a BPE tokenizer beside it.

    Args:
        checkpoint: The contents of a checkpoint of :class:`~lit_transformer.LitCausalLM` or
            :class:`~lit_transformer.LitMaskedLM`.
        folder: A new folder.

    Raises:
        UsageError: If the folder exists, the model is like none of theirs, or the weights do not fit.
    """
    settings = checkpoint["hyper_parameters"]
    weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
    network = MaskedTransformer if "head.dense.weight" in weights else Transformer
    try:
        model = network(TransformerConfig(**settings["config"]))
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
    except KeyError as error:
        raise UsageError(
            f"{_OURS_ONLY}, and this checkpoint is of none: it has no {error.args[0]}. Without --hugging_face it is "
            "exported as safetensors"
        ) from None
    except (TypeError, RuntimeError) as error:
        raise UsageError(f"{_OURS_ONLY}, and this checkpoint does not fit one: {error}") from None
    try:
        with _appearing(folder) as whole:
            save_hugging_face(model, whole)
            for data in (LanguageModelingData, MaskedLanguageModelingData):
                text = checkpoint.get(data.__qualname__, {}).get("tokenizer")
                if text is not None and text != ByteTokenizer().to_json():
                    (whole / "tokenizer.json").write_text(text, encoding="utf-8")
    except ValueError as error:
        raise UsageError(f"this model is none of Hugging Face's: {error}") from None


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A place to write to, which becomes the folder when all is written."""
    if folder.exists():
        raise UsageError(f"{folder} exists already; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        yield Path(scratch) / "whole"
        (Path(scratch) / "whole").rename(folder)


def _save_tokenizer(config: dict[str, Any], folder: Path) -> None:
    from transformers import AutoTokenizer

    places = [
        config.get(part, {}).get("init_args", {}).get(key) for part, key in (("data", "tokenizer"), ("model", "path"))
    ]
    for place in places:
        if place is not None and (Path(place).is_dir() or "/" in place):
            with contextlib.suppress(OSError, ValueError):
                AutoTokenizer.from_pretrained(place).save_pretrained(folder)
                return
    print("No tokenizer beside it: neither data.init_args.tokenizer nor model.init_args.path has one.")


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
