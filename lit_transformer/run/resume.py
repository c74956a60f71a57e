"""A checkpoint's configuration against the one at hand."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lit_transformer.errors import UsageError

_WITHOUT_EFFECT_ON_WEIGHTS = ("target_batch_tokens",)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU and without unpickling code.

    Raises:
        UsageError: If there is no such file, or it is not a readable checkpoint.
    """
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}; runs keep theirs in <run folder>/checkpoints")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    if "state_dict" not in checkpoint:
        raise UsageError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    return checkpoint


def check_same_configuration(checkpoint: Mapping[str, Any], module: LightningModule, path: Path) -> None:
    """Refuse to go on with a configuration other than the checkpoint's.

    Raises:
        UsageError: Naming every value that differs.
    """
    then = dict(_flatten(checkpoint.get("hyper_parameters", {})))
    now = dict(_flatten(dict(module.hparams)))
    differences = [
        f"{key} was {then.get(key, 'unset')} and is {now.get(key, 'unset')}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and key not in _WITHOUT_EFFECT_ON_WEIGHTS
    ]
    if differences:
        raise UsageError(
            f"the configuration does not match the checkpoint {path}: {'; '.join(differences)}. Use the checkpoint's "
            f"configuration by leaving --config and these flags out, or the new one on purpose by "
            f"--allow_config_change true"
        )


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(item) if isinstance(item, tuple) else item
