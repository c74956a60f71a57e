"""How a fault spoils a batch, a loss, a weight or an optimizer's state. Batches are replaced, never written to."""

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from lit_callbacks._errors import SetupError
from lit_callbacks._fault import Fault
from lit_callbacks._names import clean_name

_LABELS = ("labels", "label", "targets", "target", "y")
_NO_IDS = re.compile("mask|position|segment|type")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
T = TypeVar("T")


def matching(fault: Fault, named: Iterable[tuple[str, T]]) -> list[T]:
    things = [(clean_name(name), thing) for name, thing in named]
    found = [thing for name, thing in things if fault.where is None or fnmatchcase(name, fault.where)]
    if not found:
        names = [name for name, _ in things if name]
        there = ", ".join(names[:3]) + (", …" if len(names) > 3 else "") or "nothing (optimizers have state later)"
        raise SetupError(f"{fault} finds nothing to strike: where is {fault.where!r}, and there is {there}")
    return found


def parameter_of(fault: Fault, module: nn.Module, usable: Callable[[Tensor], bool]) -> Tensor:
    found = matching(fault, ((n, p) for n, p in module.named_parameters() if p.is_floating_point() and usable(p)))
    if fault.where is not None:
        return found[0]
    found = [parameter for parameter in found if parameter.dim() >= 2] or found
    return found[len(found) // 2]


def modules_of(fault: Fault, module: nn.Module) -> list[nn.Module]:
    """The first of these to run is struck: not the first of all, as attention's ``out_proj`` for one never runs."""
    found = matching(fault, module.named_modules())
    if fault.where is not None:
        return found
    leaves = [m for m in found if len([*m.modules()]) == 1 and [*m.parameters()]]
    return leaves[len(leaves) // 2 :] if fault.kind == "nan_activation" else leaves


@torch.no_grad()
def damage(fault: Fault, module: nn.Module, optimizers: Sequence[Optimizer], generator: Generator) -> None:
    states = {
        id(parameter): [tensor for _, tensor in tensors_of(state) if tensor.is_floating_point() and tensor.dim()]
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
    }
    if fault.kind == "nan_optimizer_state":
        for tensor in states[id(parameter_of(fault, module, lambda p: bool(states.get(id(p)))))]:
            tensor[(0,) * tensor.dim()] = math.nan
        return
    parameter = parameter_of(fault, module, lambda _: True)
    place = place_in(parameter, generator)
    if fault.kind == "nan_weight":
        parameter[place] = math.nan
    else:
        bits = parameter.view(_INTEGERS[parameter.element_size()])
        bits[place] ^= 1 << (8 * parameter.element_size() - 2)  # in front of it is only the sign


def place_in(tensor: Tensor, generator: Generator) -> tuple[int, ...]:
    return tuple(int(torch.randint(size, (), generator=generator)) for size in tensor.shape)


def value_of(fault: Fault) -> float:
    return math.inf if fault.kind.startswith("inf") else math.nan


def spoiled_loss(output: Any, value: float) -> Any:
    if isinstance(output, Mapping):
        return {**output, "loss": spoiled_loss(output["loss"], value)}
    return (output - output.detach() + 1) * value  # not loss * inf, which is NaN for 0 and -inf for negative losses


def tensors_of(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested mappings, tuples and lists, with the key it is under."""
    if isinstance(batch, Tensor):
        yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors_of(value, str(key))
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors_of(value, name)


def replaced(batch: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors, in the order of :func:`_tensors`."""
    if isinstance(batch, Tensor):
        return next(tensors)
    if isinstance(batch, Mapping):
        copied: Any = copy.copy(batch)
        for key, value in batch.items():
            copied[key] = replaced(value, tensors)
        return copied
    if isinstance(batch, tuple | list):
        values = [replaced(value, tensors) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def spoiled(fault: Fault, batch: Any, generator: Generator) -> Any:
    """A batch like this one, with the fault in it, or None if an ``exploding_batch`` has nothing to explode.

    Nothing is written to: tensors may be views of the data set.
    """
    named = list(tensors_of(batch))
    if isinstance(batch, tuple | list) and len(named) > 1 and not any(name in _LABELS for name, _ in named):
        named[-1] = ("labels", named[-1][1])
    tensors = [tensor for _, tensor in named]
    chosen = [i for i, (name, tensor) in enumerate(named) if _concerns(fault, name, tensor)]
    if not chosen and fault.kind == "exploding_batch":
        return None
    if not chosen:
        found = ", ".join(f"{name} {[*tensor.shape]} {tensor.dtype}".strip() for name, tensor in named)
        raise SetupError(
            f"{fault} finds nothing to change in a batch of {found or type(batch).__name__}. Labels are what is under "
            f"{', '.join(_LABELS)}, or the last tensor of a tuple; tokens are integers, in two dimensions or more."
        )
    like = tensors[chosen[0]] if fault.kind == "constant_tokens" else None
    for i in chosen:
        if fault.kind == "exploding_batch":
            tensors[i] = tensors[i] * fault.factor
        elif fault.kind == "shuffled_labels":
            tensors[i] = _shuffled(tensors[i], generator)
        else:
            tensors[i] = _garbage(tensors[i], like, generator)
    return replaced(batch, iter(tensors))


def _concerns(fault: Fault, name: str, tensor: Tensor) -> bool:
    if fault.kind == "exploding_batch":
        return tensor.is_floating_point() and "mask" not in name
    if fault.kind == "shuffled_labels":
        return name in _LABELS
    is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return is_integer and tensor.dim() >= 2 and not _NO_IDS.search(name) and bool((tensor >= 0).any())


def _shuffled(labels: Tensor, generator: Generator) -> Tensor:
    counts = torch.ones(len(labels), dtype=torch.bool) if labels.is_floating_point() else labels != -100
    result, values = labels.clone(), labels[counts]
    result[counts] = values[torch.randperm(len(values), generator=generator)]
    return result


def _garbage(tokens: Tensor, like: Tensor | None, generator: Generator) -> Tensor:
    """Random ids, or the first id of ``like`` if it may be one of these: labels may have a vocabulary of their own."""
    ids = tokens[tokens >= 0]
    low, high = int(ids.min()), int(ids.max())
    if like is not None:
        constant = int(like[like >= 0][0])
        low = high = constant if low <= constant <= high else low
    drawn = torch.randint(low, high + 1, tokens.shape, generator=generator).to(tokens)
    return torch.where(tokens >= 0, drawn, tokens)
