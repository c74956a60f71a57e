"""Which weight of theirs is which of ours."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]

UNSCALED = (None, "xavier", "kaiming", "normal", "gpt2")
"""Initialisations after which embeddings enter as they are; ``small`` multiplies them, which none of theirs does."""


@dataclass(frozen=True)
class Entry:
    """A weight of ours, and those of theirs that it is made of, one below the other.

    Args:
        ours: Its name.
        theirs: Their names.
        sizes: Rows of each; all there are by default.
        transposed: Whether theirs are ``(in, out)``, as GPT-2's are.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    transposed: bool = False


def to_ours(entries: Iterable[Entry], theirs: Weights, ignored: Iterable[str] = ()) -> dict[str, Tensor]:
    """Our weights from theirs.

    Args:
        entries: Which is which.
        theirs: By name.
        ignored: Globs over names of theirs that say nothing new.

    Raises:
        ValueError: If a weight is missing, or there is one more than expected.
    """
    left = {name for name in theirs if not any(fnmatchcase(name, glob) for glob in ignored)}
    found = {}
    for entry in entries:
        if missing := [name for name in entry.theirs if name not in theirs]:
            raise ValueError(f"expected a weight {missing[0]}, and there is none")
        parts = [theirs[name].T if entry.transposed else theirs[name] for name in entry.theirs]
        found[entry.ours] = torch.cat(parts).contiguous() if len(parts) > 1 else parts[0].contiguous()
        left -= set(entry.theirs)
    if left:
        raise ValueError(f"there is no place for the weight {min(left)}")
    return found


def to_theirs(entries: Iterable[Entry], ours: Weights) -> dict[str, Tensor]:
    """Their weights from ours."""
    found: dict[str, Tensor] = {}
    for entry in entries:
        weight = ours[entry.ours].T if entry.transposed else ours[entry.ours]
        parts = [weight] if entry.sizes is None else weight.split(entry.sizes)
        found |= {name: part.contiguous().clone() for name, part in zip(entry.theirs, parts, strict=True)}
    return found


def both(ours: str, theirs: str, kinds: Iterable[str] = ("weight", "bias"), transposed: bool = False) -> list[Entry]:
    """Weight and bias of a layer that is one layer there, too."""
    return [
        Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), transposed=transposed and kind == "weight") for kind in kinds
    ]


def demand(settings: Mapping[str, object], expected: Mapping[str, object]) -> None:
    """Refuse settings that the other side cannot have.

    Raises:
        ValueError: Naming the first, its value, and what it would have to be.
    """
    for name, value in expected.items():
        if name not in settings:
            continue
        got = settings[name]
        if got not in value if isinstance(value, tuple) else got != value:
            wanted = " or ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"expected {name}={wanted}, got {got}: this cannot be converted")
