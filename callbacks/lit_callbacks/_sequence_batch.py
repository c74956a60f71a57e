"""The sequences of a batch of any kind, made shorter: the rest is cut off, or becomes samples of its own."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_callbacks._errors import SetupError

_IGNORED = -100  # the target of a position that does not count, for torch and Hugging Face


class SequenceBatch:
    """A batch of B sequences of T tokens, batch first, in mappings, tuples, lists and dataclasses, or a tensor.

    B and T are the shape of ``input_ids``, else of the first integer tensor of two dimensions. Of a sequence is what
    has T as its second dimension, and what is called a mask and has it as any; the rest is of whole samples. Targets in
    floating point are classes, not tokens.

    Args:
        batch: The batch. It is left as it is.
        keys: Names of what is of a sequence, where that is not to be found by shape.

    Raises:
        SetupError: If there are no token ids.
    """

    def __init__(self, batch: Any, keys: Collection[str] | None = None) -> None:
        self.batch, self.keys = batch, keys
        self._parts: list[tuple[str, Tensor]] = []
        _changed(batch, self._collect)
        ids = [x for name, x in self._parts if x.dim() == 2 and _is_integer(x) and (keys is None or name in keys)]
        if not ids:
            raise SetupError(
                f"SequenceLengthCurriculum expected a batch with token ids, an integer tensor of two dimensions"
                f"{'' if keys is None else f' that is called one of {sorted(keys)}'}, got {describe(batch)}."
            )
        named = [x for name, x in self._parts if name == "input_ids" and x.dim() == 2]
        self.samples, self.tokens = (named or ids)[0].shape

    def _collect(self, name: str, x: Tensor) -> Tensor:
        self._parts.append((name, x))
        return x

    def cut(self, length: int) -> Any:
        """The batch with ``length`` tokens of each sequence.

        These are the first ones that are no padding on the left; where no target counts among them, they are moved so
        far that the first one which does is in their middle.
        """
        begin = self._begin(length)
        places = begin + torch.arange(length, device=begin.device)

        def change(name: str, x: Tensor) -> Tensor:
            for dim in self._dims(name, x):
                shape = [-1 if d == 0 else length if d == dim else 1 for d in range(x.dim())]
                x = torch.take_along_dim(x, places.view(shape), dim)
            return x

        return _changed(self.batch, change)

    def _begin(self, length: int) -> Tensor:
        """Where each sequence begins, ``(B, 1)``. Computed on the device, so that nobody waits for it."""
        whole = [(name, x) for name, x in self._parts if x.shape == (self.samples, self.tokens)]
        begin = torch.zeros(self.samples, 1, dtype=torch.int64, device=whole[0][1].device)
        for name, x in whole:
            if name == "attention_mask":
                begin = _first(x != 0)
        for _, x in whole:
            first = _first(x != _IGNORED)  # 0 for all that are no targets
            begin = torch.where(first >= begin + length, first - length // 2, begin)
        return begin.clamp(max=self.tokens - length)

    def fold(self, pieces: int) -> Any:
        """The batch with each sequence as so many samples of equal length.

        Tokens that are left over at the end, fewer than there are pieces, are cut off. What is of whole samples is
        repeated, ``position_ids`` begin anew, and pieces without any attention are taken out.
        """
        length = self.tokens // pieces
        attended: list[Tensor] = []

        def change(name: str, x: Tensor) -> Tensor:
            dims = self._dims(name, x)
            if x.shape[:1] != (self.samples,):  # one for all samples
                for dim in dims:
                    x = x.narrow(dim, 0, length)
                return x.contiguous()
            if not dims:
                return x.repeat_interleave(pieces, 0)
            x = _folded(x, dims, pieces, length)
            if name == "position_ids":
                runs = (x == x[:, :1] + torch.arange(length, device=x.device)).int().cumprod(1).bool()
                x = torch.where(runs, x - x[:, :1], x)
            if name == "attention_mask" and x.dim() == 2:
                attended.append(x.bool().any(1))
            return x.contiguous()

        folded = _changed(self.batch, change)
        if not attended:
            return folded
        return _changed(folded, lambda _, x: x[attended[0]] if x.shape[:1] == attended[0].shape else x)

    def refuse_targets_of_samples(self) -> None:
        """Refuse what cannot be folded.

        Raises:
            SetupError: If a sample has a target of its own, or that cannot be told for want of names.
        """
        for name, x in self._parts:
            if x.shape[:1] != (self.samples,) or self._dims(name, x) or (name and not _is_target(name)):
                continue
            what = f"{name} of shape {tuple(x.shape)}" if name else f"a tensor of shape {tuple(x.shape)} without a name"
            raise SetupError(
                f"SequenceLengthCurriculum(keep_tokens=True) makes several samples of one, as for language modelling, "
                f"but the batch has {what}, which {'is' if name else 'may be'} a target of the whole sample. Leave out "
                f"keep_tokens{'' if name else ', or make the batch a dict'}."
            )

    def _dims(self, name: str, x: Tensor) -> list[int]:
        """The dimensions of a tensor that run along the sequence."""
        if (self.keys is not None and name not in self.keys) or x.dim() < 2 or x.shape[0] not in (1, self.samples):
            return []
        if "mask" in name and x.dim() > 2:
            return [d for d in range(1, x.dim()) if x.shape[d] == self.tokens]
        is_class = self.keys is None and _is_target(name) and not _is_integer(x)
        return [1] if x.shape[1] == self.tokens and not is_class else []


def _folded(x: Tensor, dims: list[int], pieces: int, length: int) -> Tensor:
    for dim in reversed(dims):
        x = x.narrow(dim, 0, pieces * length).unflatten(dim, (pieces, length))
    if len(dims) == 1:
        return x.movedim(dims[0], 1).flatten(0, 1)
    return x.diagonal(dim1=dims[0], dim2=dims[1] + 1).movedim(-1, 1).flatten(0, 1)  # who sees whom within a piece


def _is_integer(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex()


def _is_target(name: str) -> bool:
    return name == "y" or name.endswith(("label", "labels", "target", "targets"))


def _first(mask: Tensor) -> Tensor:
    """Index of the first True of each row, ``(B, 1)``; 0 if there is none."""
    return mask.int().argmax(1, keepdim=True)


def describe(batch: Any) -> str:
    """What a batch is made of, in a few words.

    Example:
        >>> describe({"pixels": torch.zeros(4, 3, 8, 8), "names": ["a"]})
        'dict(pixels=float32 (4, 3, 8, 8), names=list of str)'
    """
    kind = type(batch).__name__
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"{kind}({', '.join(f'{key}={describe(value)}' for key, value in batch.items())})"
    if isinstance(batch, tuple | list) and any(isinstance(part, Tensor | Mapping | tuple | list) for part in batch):
        return f"{kind}({', '.join(map(describe, batch))})"
    return f"{kind} of {type(batch[0]).__name__}" if isinstance(batch, tuple | list) and batch else kind


def _changed(batch: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """A batch of the same kind, with its tensors changed by their names: those of keys and fields, else none."""
    if isinstance(batch, Tensor):
        return change(name, batch)
    if isinstance(batch, Mapping):
        changed: Any = copy.copy(batch)  # also of a BatchEncoding, which is a UserDict
        for key, value in batch.items():
            changed[key] = _changed(value, change, str(key))
        return changed
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        named = zip(batch._fields, batch, strict=True)
        return type(batch)(*(_changed(part, change, field) for field, part in named))
    if isinstance(batch, tuple | list):
        return type(batch)(_changed(part, change, name) for part in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: _changed(getattr(batch, f.name), change, f.name) for f in fields(batch)})
    return batch
