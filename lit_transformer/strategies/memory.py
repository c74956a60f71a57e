"""What training holds in the memory of each device, under every strategy, counted before anything is made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_transformer.nn.blocks import repeated_blocks
from lit_transformer.optim.schedule_free import is_schedule_free

_ALIGNMENT = 64  # bytes, of each tensor in a snapshot
_BUCKET = 200_000_000  # numbers; Lightning's reduce_bucket_size and allgather_bucket_size for DeepSpeed
_LIVE = 1_000_000_000  # numbers; DeepSpeed's stage3_max_live_parameters
_PRIMES = (7, 11, 13, 17, 19)  # sizes that tell the dimensions of a parameter apart


class Room(NamedTuple):
    """A tensor that is not made: its shape, and the bytes of a number of it."""

    shape: tuple[int, ...]
    item: int

    @property
    def bytes(self) -> int:
        """Of all."""
        return prod(self.shape) * self.item


class Held(NamedTuple):
    """A parameter and what belongs to it.

    The block of a model that it is in, if it is in one; whether tensor parallelism cuts it, as the matrices of blocks;
    whether it is trained; the optimizer's states.
    """

    weight: Room
    block: int | None
    is_cut: bool
    is_trained: bool
    states: tuple[Room, ...] = ()


@dataclass(frozen=True)
class Load:
    """What has to be held somewhere.

    Args:
        parameters: Each one.
        activations: Bytes that a batch's forward pass keeps for the backward pass; None if that is not known.
        divided: How many of these are divided under tensor parallelism.
        buffers: Bytes of each buffer.
        keep_snapshots: How many snapshots LossSpikeRecovery keeps; 0 without it.
        is_mixed: Whether precision is mixed: DeepSpeed then has weights and gradients of two bytes.
    """

    parameters: Sequence[Held]
    activations: int | None
    divided: int = 0
    buffers: Sequence[int] = ()
    keep_snapshots: int = 0
    is_mixed: bool = False

    @property
    def without_casts(self) -> int | None:
        """Activations where matrices are in half precision already: autocast makes a copy, which autograd keeps."""
        if self.activations is None or not self.is_mixed:
            return self.activations
        return self.activations - 2 * sum(prod(held.weight.shape) for held in self.parameters if held.is_cut)

    @property
    def numbers(self) -> int:
        """Of all parameters."""
        return sum(prod(held.weight.shape) for held in self.parameters)


@dataclass(frozen=True)
class Use:
    """Bytes for one device, the one that holds most, under a strategy.

    Args:
        strategy: Its name.
        parameters: What is held of them all the time, DeepSpeed's copies in fp32 included.
        gradients: Of what is trained.
        states: The optimizer's.
        activations: None if that is not known.
        exchange: What is whole only while a block computes, and buffers of communication.
        host: What is offloaded, in the memory of the machine.
        snapshots: LossSpikeRecovery's, in the memory of the machine.
    """

    strategy: str
    parameters: int
    gradients: int
    states: int
    activations: int | None
    exchange: int = 0
    host: int = 0
    snapshots: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return self.parameters + self.gradients + self.states + (self.activations or 0) + self.exchange


def optimizer_states(
    factory: Callable[..., Optimizer], groups: Sequence[Mapping[str, Any]]
) -> dict[int, tuple[Room, ...]]:
    """What an optimizer keeps of each parameter, by the parameter's id.

    An optimizer of the kind takes a step on parameters of a few numbers, and the shapes of what it has then are scaled
    up: nothing of the parameters' own size is made.

    Args:
        factory: Makes an optimizer of groups.
        groups: Of parameters on any device.

    Example:
        >>> weight = nn.Parameter(torch.empty(1000, 2000, device="meta"))
        >>> [room.shape for room in optimizer_states(torch.optim.AdamW, [{"params": [weight]}])[id(weight)]]
        [(), (1000, 2000), (1000, 2000)]
    """
    parameters: list[Tensor] = [p for group in groups for p in group["params"]]
    small = {id(p): nn.Parameter(torch.zeros(_PRIMES[: p.ndim], dtype=p.dtype)) for p in parameters}
    for parameter in small.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer: Any = factory([{**group, "params": [small[id(p)] for p in group["params"]]} for group in groups])
    if is_schedule_free(optimizer):
        optimizer.train()
    optimizer.step()
    found = {}
    for p in parameters:
        sizes = dict(zip(_PRIMES, p.shape, strict=False))
        states = [value for value in optimizer.state[small[id(p)]].values() if isinstance(value, Tensor)]
        found[id(p)] = tuple(Room(tuple(sizes.get(n, n) for n in s.shape), s.element_size()) for s in states)
    return found


def held_by(model: nn.Module, states: Mapping[int, tuple[Room, ...]]) -> list[Held]:
    """The parameters of a model, which may be on the meta device, with the states of :func:`optimizer_states`."""
    blocks = repeated_blocks(model)
    block_of = {id(p): i for i, block in enumerate(blocks) for p in block.parameters()}
    matrices = {id(m.weight) for block in blocks for m in block.modules() if isinstance(m, nn.Linear)}
    return [
        Held(
            Room(tuple(p.shape), p.element_size()), block_of.get(id(p)), id(p) in matrices, p.requires_grad,
            states.get(id(p), ()),
        )
        for p in model.parameters()
    ]  # fmt: skip


def uses(load: Load, devices: int, tensor: int = 1) -> list[Use]:
    """What each strategy holds on one of several devices.

    For one device, DDP and FSDP2 parameters, gradients, states and snapshots are exact. FSDP1 is counted as FSDP2, both
    as sharding each block; DeepSpeed by the division of ZeRO (Rajbhandari et al. 2020).

    Args:
        load: What there is.
        devices: How many.
        tensor: How many devices compute each block together; 1 leaves tensor parallelism out.

    Raises:
        ValueError: If ``devices`` is no multiple of ``tensor``, or one is below 1.

    Example:
        >>> moments = (Room((1000, 1000), 4), Room((1000, 1000), 4))
        >>> load = Load([Held(Room((1000, 1000), 4), 0, True, True, moments)], activations=0)
        >>> {use.strategy: use.states for use in uses(load, 4)}["fsdp2"]
        2000000
    """
    if devices < 1 or tensor < 1 or devices % tensor:
        raise ValueError(f"expected a number of devices that tensor parallelism divides, got {devices} and {tensor}")
    sharded = _fsdp(load, devices)
    fsdp1 = replace(sharded, strategy="fsdp", activations=load.without_casts)
    return [
        _replicated(load),
        replace(_replicated(load), strategy="ddp", exchange=_replicated(load).gradients),  # it sums in buckets
        *([replace(_fsdp(load, devices, tensor), strategy=f"fsdp2, tensor {tensor}")] if tensor > 1 else []),
        sharded,
        fsdp1,
        _to_host(replace(fsdp1, strategy="fsdp_cpu_offload")),
        *(_zero(load, devices, stage) for stage in (1, 2, 3)),
        *(_zero(load, devices, stage, offload=True) for stage in (2, 3)),
    ]


def _replicated(load: Load) -> Use:
    return _divided(load, lambda held, room: room.bytes)


def _fsdp(load: Load, devices: int, tensor: int = 1) -> Use:
    """Rows of each tensor on each device; tensor parallelism first cuts the matrices of blocks."""

    def part(held: Held, room: Room) -> int:
        if not room.shape:
            return room.bytes
        cut = tensor if held.is_cut else 1
        return ceil(room.shape[0] / (devices // tensor)) * prod(room.shape[1:]) * room.item // cut

    whole: dict[int | None, int] = {}
    for held in load.parameters:
        whole[held.block] = whole.get(held.block, 0) + held.weight.bytes // (tensor if held.is_cut else 1)
    outside = whole.pop(None, 0)
    # What is in no block stays whole through the step, and its gradient; of blocks there are two, and one's gradient.
    exchange = 2 * outside + 3 * max(whole.values(), default=0) if devices > tensor else 0
    kept = None if load.activations is None else load.activations - load.divided + load.divided // tensor
    return replace(_divided(load, part), strategy="fsdp2", exchange=exchange, activations=kept)


def _divided(load: Load, part: Callable[[Held, Room], int]) -> Use:
    """``part`` says how many bytes of a tensor a device holds."""
    trained = [held for held in load.parameters if held.is_trained]
    states = [part(held, state) for held in trained for state in held.states]
    weights = [part(held, held.weight) for held in trained]
    frozen = sum(part(held, held.weight) for held in load.parameters if not held.is_trained)
    snapshot = sum(map(_aligned, [*weights, *states, *load.buffers]))
    return Use(
        "one device", frozen + sum(weights), sum(weights), sum(states), load.activations,
        snapshots=load.keep_snapshots * snapshot,
    )  # fmt: skip


def _zero(load: Load, devices: int, stage: int, offload: bool = False) -> Use:
    """Stage 1 divides states, 2 gradients too, 3 parameters too; all keep what is trained in fp32 as well."""
    trained = [held for held in load.parameters if held.is_trained]
    item = min(2 if load.is_mixed else 4, load.parameters[0].weight.item)
    n_trained = sum(prod(held.weight.shape) for held in trained)
    n_states = sum(prod(state.shape) for held in trained for state in held.states if state.shape)
    weights = item * load.numbers // (devices if stage == 3 else 1)
    masters, states = 4 * n_trained // devices, 4 * n_states // devices
    gradients = item * n_trained // (devices if stage > 1 else 1)
    buckets = item * min(_BUCKET, load.numbers)
    use = Use(
        f"deepspeed_stage_{stage}", weights + masters, gradients, states, load.without_casts,
        buckets + (item * min(_LIVE, load.numbers) if stage == 3 else buckets),
        snapshots=load.keep_snapshots * (weights + masters + states),
    )  # fmt: skip
    if not offload:
        return use
    use = replace(use, strategy=f"{use.strategy}_offload", gradients=4 * n_trained // devices)
    return _to_host(use, stays=0 if stage == 3 else weights)


def _to_host(use: Use, stays: int = 0) -> Use:
    """With parameters, gradients and states in the memory of the machine, but for what stays of the parameters."""
    moved = use.parameters - stays + use.gradients + use.states
    return replace(use, parameters=stays, gradients=0, states=0, host=moved)


def _aligned(size: int) -> int:
    return ceil(size / _ALIGNMENT) * _ALIGNMENT
