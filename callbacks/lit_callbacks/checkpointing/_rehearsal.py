"""A checkpoint that cannot be loaded is found before the first step, not after days."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_callbacks._errors import SetupError
from lit_callbacks.checkpointing._durable import replace_durably

_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, torch.dtype, torch.device, torch.Size)


def rehearse(checkpoint: dict[str, Any], folder: Path) -> int:
    """Save a checkpoint, load it back, delete it.

    Returns:
        Its size in bytes.

    Raises:
        SetupError: If it cannot be written, or holds something that does not load with ``weights_only=True``; it names
            the places.
    """
    path = folder / ".rehearsal.ckpt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        size, _ = replace_durably(path, lambda file: torch.save(checkpoint, file))  # type: ignore[arg-type]
    except OSError as error:
        raise SetupError(
            f"a checkpoint cannot be written into {folder}: {error.strerror or error}. Training does not start, "
            "because it could not be resumed. Make room or choose another dirpath."
        ) from None
    except Exception as error:
        found = "; ".join(f"{place} is a {kind}" for place, kind in not_plain(checkpoint)) or str(error)
        raise SetupError(
            f"a checkpoint of this run cannot be written: {found}. What cannot be pickled does not belong in "
            "hyperparameters or in the state of callbacks."
        ) from error
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # mapped: nothing is copied into memory
    except Exception as error:
        found = "; ".join(f"{place} is a {kind}" for place, kind in not_plain(checkpoint)) or str(error).splitlines()[0]
        raise SetupError(
            f"a checkpoint of this run can be saved, but not loaded again with weights_only=True: {found}. Keep plain "
            "data there: str(path), float(x), list(x), dataclasses.asdict(x)."
        ) from None
    finally:
        path.unlink(missing_ok=True)
    return size


def not_plain(data: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Places in nested data, and the types there, that ``torch.load(weights_only=True)`` refuses.

    Example:
        >>> list(not_plain({"hyper_parameters": {"root": Path("data"), "lr": 0.1}}))
        [('hyper_parameters.root', 'pathlib.PosixPath')]
    """
    if type(data) in (dict, list, tuple) or (isinstance(data, Mapping) and _loads(type(data)())):
        items = data.items() if isinstance(data, Mapping) else enumerate(data)
        for key, value in items:
            yield from not_plain(value, f"{place}.{key}" if place else str(key))
    elif type(data) not in _PLAIN and not _loads(data):
        yield place, f"{type(data).__module__}.{type(data).__qualname__}"


def _loads(data: Any) -> bool:
    try:
        file = io.BytesIO()
        torch.save(data, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:
        return False
    return True
