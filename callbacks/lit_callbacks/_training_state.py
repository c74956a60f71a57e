"""Everything that an optimizer step changes, as named tensors and plain values."""

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lit_callbacks import _deepspeed
from lit_callbacks._facts import has_scaler, parameters
from lit_callbacks._shards import as_part_of, local, settle

STATE = "optimizer "
"""What the names of optimizer states begin with."""

# What schedules set anew, so that it belongs to the step and not to the weights.
_OF_THE_SCHEDULE = {"params", "param_names", "lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum"} | {
    "base_momentum",
    "max_momentum",
}


def live_tensors(trainer: Trainer, module: LightningModule, also: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors that training changes, by name: trainable parameters, buffers, optimizer states, averaged weights.

    Of sharded ones, this rank's part.

    Frozen parameters are left out unless ``also`` names them; so are buffers that are not saved, and boolean ones.
    """
    settle(trainer.strategy.model or module)
    tensors = _of_module("", module, also)
    for index, optimizer in enumerate(trainer.optimizers):
        if _deepspeed.is_zero(optimizer):  # what it steps on are parameters of its own
            tensors |= {f"part {index} {i}": part for i, part in enumerate(parameters(optimizer))}
        for place, value in _states(optimizer):
            if isinstance(value, Tensor):
                tensors[f"{STATE}{index} {place}"] = value
    for index, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)  # of Lightning's WeightAveraging and its kin
        if isinstance(average, nn.Module):
            tensors |= _of_module(f"average {index} ", average, [name for name, _ in average.named_parameters()])
    return {name: local(tensor).detach() for name, tensor in tensors.items()}


def plain_values(trainer: Trainer) -> dict[str, Any]:
    """What is not a tensor: counters of optimizers, settings of their groups but for the schedule's, the scaler."""
    return copy.deepcopy(
        {
            "states": [
                {place: value for place, value in _states(optimizer) if not isinstance(value, Tensor)}
                for optimizer in trainer.optimizers
            ],
            "groups": [
                [{key: value for key, value in group.items() if key not in _OF_THE_SCHEDULE} for group in groups]
                for groups in (optimizer.param_groups for optimizer in trainer.optimizers)
            ],
            "precision": trainer.precision_plugin.state_dict(),
        }
    )


@torch.no_grad()
def restore(
    trainer: Trainer, module: LightningModule, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Copy saved tensors and values back in place; optimizer states that are younger than they are dropped."""
    _deepspeed.settle(trainer)
    for index, optimizer in enumerate(trainer.optimizers):
        _forget_younger(optimizer, f"{STATE}{index} ", tensors, values["states"][index])
        for place, value in values["states"][index].items():
            _set(optimizer, place, copy.deepcopy(value))
        for group, saved in zip(optimizer.param_groups, values["groups"][index], strict=True):
            group.update(copy.deepcopy(saved))
    live = live_tensors(trainer, module, also=tensors.keys())
    for name in tensors.keys() - live.keys():  # a state that has been cleared
        number, place = name.removeprefix(STATE).split(" ", 1)
        _revive(trainer.optimizers[int(number)], place, tensors[name])
    live = live_tensors(trainer, module, also=tensors.keys())
    torch._foreach_copy_([live[name] for name in tensors], list(tensors.values()), non_blocking=True)
    if has_scaler(trainer):
        trainer.precision_plugin.load_state_dict(copy.deepcopy(values["precision"]))


def _of_module(prefix: str, module: nn.Module, also: Collection[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {
        f"{prefix}{name}": parameter
        for name, parameter in module.named_parameters()
        if (parameter.requires_grad or name in also) and not is_lazy(parameter)
    }
    for path, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set and buffer.dtype != torch.bool and not is_lazy(buffer):
                tensors[f"{prefix}{path}{'.' if path else ''}{name}"] = buffer
    return tensors


def _states(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Each value of each parameter's state with its place, ``<parameter> <key>``."""
    for index, parameter in enumerate(parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{index} {key}", value


def _set(optimizer: Optimizer, place: str, value: Any) -> None:
    index, _, key = place.partition(" ")
    optimizer.state[parameters(optimizer)[int(index)]][key] = value


def _revive(optimizer: Optimizer, place: str, saved: Tensor) -> None:
    index, _, key = place.partition(" ")
    parameter = parameters(optimizer)[int(index)]
    on_device = saved.dim() or any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    state = saved.to(parameter.device, copy=True) if on_device else saved.clone()
    optimizer.state[parameter][key] = as_part_of(state, parameter) if saved.dim() else state


def _forget_younger(
    optimizer: Optimizer, prefix: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    for index, parameter in enumerate(parameters(optimizer)):
        state = optimizer.state.get(parameter, {})
        for key in list(state):
            if f"{prefix}{index} {key}" not in tensors and f"{index} {key}" not in values:
                del state[key]
        if not state:
            optimizer.state.pop(parameter, None)
