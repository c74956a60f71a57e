"""Reading a checkpoint that a model is made from."""

import pickle
from pathlib import Path
from typing import Any

import torch

from lit_transformer.errors import UsageError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a Lightning checkpoint, on the CPU and without unpickling code.

    Not verified by its manifest, which is a matter of the callbacks, which a model does not need.

    Raises:
        UsageError: If there is no such file, or it is none.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UsageError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(contents, dict) or "state_dict" not in contents or "hyper_parameters" not in contents:
        raise UsageError(f"{path} is not a checkpoint of this package: it has no state_dict with hyper_parameters")
    return contents
