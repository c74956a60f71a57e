"""A checkpoint's configuration against the one at hand."""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from lit_transformer.errors import UsageError

_MAY_CHANGE = {
    "target_batch_tokens",  # restated at the start of every fit
    *("num_workers", "prefetch_factor", "persistent_workers", "pin_memory"),
    *("init_from", "path"),  # what a new run starts from; one that goes on has its weights
    *("files", "val_files", "test_files", "cache_dir"),  # places; the data module compares the contents
}


def check_same_configuration(
    checkpoint: Mapping[str, Any], module: LightningModule, data: LightningDataModule | None, path: Path
) -> None:
    """Refuse to go on with a configuration other than the checkpoint's; without ``data``, with another model.

    Raises:
        UsageError: Naming every value that differs.
    """
    data_then = {} if data is None else _defaults(data) | checkpoint.get("datamodule_hyper_parameters", {})
    then = _settings(checkpoint.get("hyper_parameters", {}), data_then)
    now = _settings(module.hparams, {} if data is None else data.hparams)
    differences = [
        f"{key} was {then.get(key, 'unset')} and is {now.get(key, 'unset')}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if differences:
        raise UsageError(
            f"the configuration does not match the checkpoint {path}: {'; '.join(differences)}. Use the checkpoint's "
            f"configuration by leaving --config and these flags out, or the new one on purpose by "
            f"--allow_config_change true"
        )


def _defaults(data: LightningDataModule) -> dict[str, Any]:
    """What settings that there were not yet would have been."""
    parameters = inspect.signature(type(data)).parameters
    return {name: parameters[name].default for name in data.hparams if name in parameters}


def _settings(model: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    flat = {f"model.{key}": value for key, value in _flatten(model)} | {f"data.{key}": v for key, v in _flatten(data)}
    return {key: value for key, value in flat.items() if key.partition(".")[2] not in _MAY_CHANGE}


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(item) if isinstance(item, tuple) else item
