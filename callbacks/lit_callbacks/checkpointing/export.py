"""The weights alone, for others: no pickle, and digests that tell damage."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_callbacks._redaction import redacted
from lit_callbacks.checkpointing._durable import HashedFile, replace_durably
from lit_callbacks.checkpointing._errors import CheckpointError
from lit_callbacks.checkpointing.atomic_checkpoint_io import load_verified
from lit_callbacks.checkpointing.manifest import Content, contents

WEIGHTS, SETTINGS, DIGESTS = "model.safetensors", "config.json", "digests.json"


def export_weights(checkpoint: Path, folder: Path) -> None:
    """Write the weights and the hyperparameters of a checkpoint into a new folder.

    ``model.safetensors`` has the ``state_dict``, ``config.json`` the hyperparameters as plain JSON without secrets of
    the environment, ``digests.json`` the SHA-256 of both: safetensors itself has no checksum.

    Args:
        checkpoint: A Lightning checkpoint; it is verified.
        folder: Where to write; it must not have files of these names.

    Raises:
        CheckpointError: If the checkpoint cannot be trusted, has other weights than tensors or hyperparameters that
            JSON cannot hold, or if the folder has files of these names or cannot be written.

    Cost: one copy of the weights in memory.
    """
    from safetensors.torch import save

    if there := [name for name in (WEIGHTS, SETTINGS, DIGESTS) if (folder / name).exists()]:
        raise CheckpointError(f"there is a {there[0]} in {folder} already; choose another folder")
    loaded = load_verified(checkpoint)
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        raise CheckpointError(f"{checkpoint} is not a Lightning checkpoint: it has no state_dict")
    settings = redacted(dict(loaded.get("hyper_parameters", {})))
    try:
        text = json.dumps(settings, indent=1) + "\n"
    except TypeError as error:
        raise CheckpointError(f"the hyperparameters of {checkpoint} cannot be written as JSON: {error}") from None
    weights = loaded["state_dict"]
    if other := [n for n, w in weights.items() if not isinstance(w, Tensor) or w.layout != torch.strided]:
        raise CheckpointError(f"the weights of {checkpoint} cannot be exported: {other[0]} is not a dense tensor")
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
        _write(folder / SETTINGS, text.encode())
        digests = {name: contents(folder / name)["."]._asdict() for name in (WEIGHTS, SETTINGS)}
        _write(folder / DIGESTS, (json.dumps(digests, indent=1) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"the export cannot be written into {folder}: {error.strerror}") from None


def load_exported(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the hyperparameters of an export, after comparing the digests.

    Raises:
        CheckpointError: If it is not a whole export, or one of its files has changed.
    """
    from safetensors.torch import load

    try:
        digests = json.loads((folder / DIGESTS).read_bytes())
        expected = {name: Content(**digests[name]) for name in (WEIGHTS, SETTINGS)}
        found = {name: contents(folder / name)["."] for name in expected}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a whole export: {error}") from None
    if changed := [name for name in expected if found[name] != expected[name]]:
        raise CheckpointError(f"{folder / changed[0]} is not what was exported: its SHA-256 differs")
    return load((folder / WEIGHTS).read_bytes()), json.loads((folder / SETTINGS).read_bytes())


def _write(path: Path, data: bytes) -> None:
    def write(file: HashedFile) -> None:
        file.write(data)

    replace_durably(path, write)
