"""Blocks cut along their heads and hidden units, each device with its own (Megatron; Shoeybi et al. 2019, 3).

A sub-layer reads the whole stream, computes with a device's heads or units alone, and writes its part of a sum::

    x ── copy ── qkv ── attention ── out ── sum      x ── copy ── up ── activation ── down ── sum

``copy`` is the identity whose gradients are summed over the devices of a group; ``sum`` sums values, and its gradients
are copies: two exchanges of activations a sub-layer and step. Whatever is outside of sub-layers, embeddings, norms and
the output layer, every device of a group has, and computes alike.

Parameters are DTensors over the group, so that optimizers, clipping, FSDP2 and checkpoints know which are parts.
Modules compute with their local parts: that is as fast as without, and monitors see ordinary tensors.

Matrices that are stacked in one parameter, such as queries, keys and values, stay so, for one product is faster than
three: before it is cut, its rows are ordered by device. A parameter of each matrix, the other way, would have other
names than in every other run, and so would its optimizer state. :func:`reordered` undoes it for checkpoints.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from lit_transformer.errors import UsageError
from lit_transformer.nn import TransformerConfig
from lit_transformer.nn.attention import CrossAttention, SelfAttention
from lit_transformer.nn.init import stacked_matrices
from lit_transformer.nn.stack import Block
from lit_transformer.strategies.deferred import Draws

_COLUMNS = ("qkv", "q", "kv", "up", "gate_up")
_ROWS = ("out", "down")
_HEAD_NORMS = ("q_norm", "k_norm")


class _Local(nn.Module):
    """Gives its forward pass this device's part of each parameter."""

    mesh: DeviceMesh

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        # While FSDP2 holds a parameter in parts of its own, it is over two dimensions of devices.
        return value.to_local() if isinstance(value, DTensor) and value.device_mesh.ndim == 1 else value


class _HeadNorm(_Local):
    """A norm that a device applies to its heads: its gradients are parts of a sum."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value if isinstance(value, DTensor) or not isinstance(value, Tensor) else copy(value, self.mesh)


class _ColumnParallel(_Local, nn.Linear):
    """A linear layer with the rows of some outputs."""

    order: Tensor | None
    """Which rows of the whole are in which place, where they are not in their own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(copy(x, self.mesh), self.weight, self.bias)


class _RowParallel(_Local, nn.Linear):
    """A linear layer with the columns of some inputs."""

    def forward(self, x: Tensor) -> Tensor:
        y = sum_parts(F.linear(x, self.weight), self.mesh)
        return y if self.bias is None else y + self.bias


def copy(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """What every device has, to be used by each for a part of the result: the gradient is the sum of theirs."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def sum_parts(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over devices of what each has computed."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()


def cut(model: nn.Module, config: TransformerConfig, mesh: DeviceMesh, draws: Draws) -> None:
    """Leave each device of a group its heads and hidden units of every block, in place.

    Weights are those of the group's first device, and so are the random numbers from here on: dropout outside of
    sub-layers must be the same on all. Inside, devices drop the same places of their own heads and units.

    Args:
        model: One of ours.
        config: Its configuration.
        mesh: The group, in one dimension.
        draws: What fills parameters that have no memory yet, each when it is cut.

    Raises:
        UsageError: If the number of devices does not divide heads, heads of keys and values, or hidden units.
    """
    _check(config, mesh.size())
    stacked = {role: [size for _, size in parts] for role, parts in stacked_matrices(config).items()}
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    roles = {module: name.rpartition(".")[2] for block in blocks for name, module in block.named_modules()}
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay so
    for module in list(model.modules()):
        if isinstance(module, SelfAttention | CrossAttention):
            module.n_heads //= mesh.size()
            module.n_kv_heads //= mesh.size()
        own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        if not own:
            continue
        role = roles.get(module, "")
        order = by_device(stacked[role], mesh.size()) if role in stacked else None
        for name, parameter in own.items():
            if parameter not in made:
                made[parameter] = _distribute(parameter, draws.whole(parameter), order, mesh, _placement(role, name))
            module._parameters[name] = made[parameter]
        module.__class__ = _parallel(type(module), role)  # type: ignore[arg-type]
        module.mesh, module.order = mesh, order  # type: ignore[assignment]
    _share_random_numbers(mesh)


def by_device(sizes: Sequence[int], n: int) -> Tensor:
    """The rows of stacked matrices so that each of ``n`` devices finds its part of every matrix in one piece.

    Example:
        >>> by_device([4, 2, 2], 2).tolist()
        [0, 1, 4, 6, 2, 3, 5, 7]
    """
    matrices = torch.arange(sum(sizes)).split(list(sizes))
    return torch.cat([matrix.chunk(n)[device] for device in range(n) for matrix in matrices])


def stacked_orders(model: nn.Module) -> dict[str, Tensor]:
    """By name, the order of the rows of each parameter that :func:`cut` has ordered by device."""
    return {
        f"{name}.{parameter}": module.order
        for name, module in model.named_modules()
        if isinstance(module, _ColumnParallel) and module.order is not None
        for parameter, _ in module.named_parameters(recurse=False)
    }


def reordered(tensor: Tensor, order: Tensor) -> Tensor:
    """The rows of a tensor in another order, in parts if it was; then every device must call this.

    Cost: the whole tensor on every device for the moment.
    """
    if not isinstance(tensor, DTensor):
        return tensor[order]
    device = tensor.device_mesh.device_type
    there = tensor.detach().to(device)  # of a checkpoint, parts are on the host by now
    assert isinstance(there, DTensor)
    return part_of(there.full_tensor()[order.to(device)], tensor)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor in the parts, and on the device, of another one, if it has any; each device has all of it already."""
    if not isinstance(like, DTensor):
        return whole
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None
    part = whole
    places = zip(like.device_mesh.shape, coordinate, like.placements, strict=True)
    for size, rank, placement in reversed(list(places)):  # FSDP2 cuts what is cut already
        if not placement.is_replicate():
            dim = placement.dim  # type: ignore[attr-defined]
            parts = part.chunk(size, dim)
            part = parts[rank] if rank < len(parts) else part.narrow(dim, 0, 0)
    return DTensor.from_local(
        part.contiguous().to(like.device), like.device_mesh, like.placements, run_check=False, shape=like.size(),
        stride=like.stride(),
    )  # fmt: skip


def _check(config: TransformerConfig, n: int) -> None:
    heads = {"n_heads": config.n_heads, "n_kv_heads": config.kv_heads, "d_ff": config.ffn_width}
    for name, value in heads.items():
        if value % n:
            raise UsageError(
                f"tensor_parallel_size must divide n_heads, n_kv_heads and d_ff of the model, got {n} and "
                f"{name}={value}; set one of the two"
            )


def _placement(role: str, name: str) -> Placement:
    if role in _COLUMNS:
        return Shard(0)
    return Shard(1) if role in _ROWS and name == "weight" else Replicate()


def _distribute(
    parameter: nn.Parameter, whole: Tensor, order: Tensor | None, mesh: DeviceMesh, placement: Placement
) -> nn.Parameter:
    ordered = whole if order is None else whole[order]
    return nn.Parameter(distribute_tensor(ordered, mesh, [placement]), parameter.requires_grad)


@cache
def _parallel(cls: type[nn.Module], role: str) -> type[nn.Module]:
    if role in (*_COLUMNS, *_ROWS):
        return _ColumnParallel if role in _COLUMNS else _RowParallel
    return type(cls.__name__, (_HeadNorm if role in _HEAD_NORMS else _Local, cls), {})


def _share_random_numbers(mesh: DeviceMesh) -> None:
    """Let all devices of the group go on from the state of the first."""
    states = [(torch.get_rng_state, torch.set_rng_state)]
    if mesh.device_type == "cuda":
        states.append((torch.cuda.get_rng_state, torch.cuda.set_rng_state))
    for get, put in states:
        state = get().to(mesh.device_type)
        dist.broadcast(state, group=mesh.get_group(), group_src=0)
        put(state.cpu())
