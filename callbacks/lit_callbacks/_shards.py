"""Tensors of which each rank holds a part."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.fsdp._runtime_utils import _reshard
from torch.distributed.tensor import DTensor

from lit_callbacks import _deepspeed
from lit_callbacks.functional import tensor_norms


def local(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory; of a tensor that is not sharded, the tensor itself."""
    if _deepspeed.is_cut(tensor):
        return _deepspeed.part(tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def settle(model: nn.Module) -> None:
    """Let FSDP give up the parameters that it keeps whole after a forward pass without a backward one.

    Between steps the model then has the sharded ones, which the optimizer has.

    Args:
        model: What the strategy has made of the module.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    for unit in FullyShardedDataParallel.fsdp_modules(model):
        handle = unit._handle
        # Not before the first forward pass, nor on a single rank.
        if handle is not None and unit._is_root is not None and handle.uses_sharded_strategy:
            _reshard(unit, handle, True)


def flat_parameters(trainer: Trainer) -> list[FlatParameter]:
    """What FSDP1 makes of the parameters of a unit, one for each: the module's own are views of it."""
    model = trainer.strategy.model
    units = [] if model is None else FullyShardedDataParallel.fsdp_modules(model)
    return [unit._handle.flat_param for unit in units if unit._handle is not None]


@contextmanager
def optimizers_as_they_are(trainer: Trainer) -> Iterator[None]:
    """Keep an optimizer that has not stepped yet as it is while its state is asked for.

    Of a sharded model, torch takes a step for it, with a learning rate of 0, that Adam counts, and schedule-free ones
    in their groups (torch 2.13, ``_init_optim_state``). ZeRO's, which looks after its own states, is left alone.
    """
    fresh = [o for o in trainer.optimizers if not o.state and not _deepspeed.is_zero(o)]
    groups = [[dict(group) for group in optimizer.param_groups] for optimizer in fresh]
    try:
        yield
    finally:
        for optimizer, before in zip(fresh, groups, strict=True):
            optimizer.state.clear()
            for group, values in zip(optimizer.param_groups, before, strict=True):
                group.clear()
                group.update(values)


def whole_shapes(trainer: Trainer, module: LightningModule) -> dict[int, torch.Size]:
    """The shape of each parameter as a whole, by its ``id``; of FSDP1's and ZeRO-3's, each rank has a flat piece."""
    shapes = {id(parameter): _deepspeed.shape(parameter) for parameter in module.parameters()}
    for flat in flat_parameters(trainer):
        assert flat._params is not None  # use_orig_params
        shapes |= {id(parameter): shape for parameter, shape in zip(flat._params, flat._shapes, strict=True)}
    return shapes


def gradient(parameter: Tensor) -> Tensor | None:
    """A parameter's gradient; an empty one where FSDP1 has left this rank no piece of it, and others have one."""
    if parameter.grad is None and _is_piece(parameter) and parameter.requires_grad and not parameter.numel():
        return parameter.detach()
    return parameter.grad


def is_sharded(module: nn.Module) -> bool:
    """Whether some rank holds a part only of some parameter."""
    return any(_parts(parameter) > 1 for parameter in module.parameters())


def whole_state(module: nn.Module) -> dict[str, Any]:
    """A copy in host memory; of a sharded module on the first rank alone. To be called on every rank."""
    if not is_sharded(module):
        return {name: value.detach().to("cpu", copy=True) for name, value in module.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # takes a while

    settle(module)
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def set_whole_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Put back what :func:`whole_state` has given. To be called on every rank."""
    if not is_sharded(module):
        module.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # takes a while

    settle(module)
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def names_with_state(checkpoint: Path) -> set[str]:
    """The parameters that the optimizer had a state of when a checkpoint in parts was saved."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # takes a while to import

    saved = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {key.removeprefix("optimizer_0.state.").rpartition(".")[0] for key in saved if ".state." in key}


def as_part_of(part: Tensor, like: Tensor) -> Tensor:
    """A tensor sharded as another one, of which this is the rank's part."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.size(), stride=like.stride()
    )


def share_norms(tensors: Sequence[Tensor], of: Sequence[Tensor] | None = None) -> Tensor:
    """This rank's share in the L2 norm of each tensor: the root mean square over ranks is the norm of the whole.

    Of a tensor that every rank has, that is its norm. A part of one in ``n`` counts ``n``-fold, so that what adds up
    squares over ranks, and divides by their number, need not know which is which.

    Args:
        tensors: The tensors.
        of: The parameters that they belong to, as gradients do; by default they are parameters.

    Returns:
        As :func:`~lit_callbacks.functional.tensor_norms`, of this rank alone: there is no communication.
    """
    parts = [_parts(tensor) for tensor in (tensors if of is None else of)]
    norms = tensor_norms([local(tensor) for tensor in tensors])
    if all(count == 1 for count in parts):
        return norms
    return norms * torch.tensor(parts, dtype=norms.dtype, device=norms.device).sqrt()


def _parts(tensor: Tensor) -> int:
    """In how many parts a tensor lies on the ranks."""
    if _deepspeed.is_cut(tensor):
        return _deepspeed.ranks_of(tensor)
    if not isinstance(tensor, DTensor):
        return distributed.get_world_size() if _is_piece(tensor) else 1
    return math.prod(
        size
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        if not placement.is_replicate()  # FSDP2 over tensor parallelism has placements of its own
    )


def _is_piece(tensor: Tensor) -> bool:
    """Whether it is a parameter that FSDP1 has flattened."""
    return getattr(tensor, "_fsdp_flattened", False)
