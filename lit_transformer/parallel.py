"""How a model is spread over devices, where the strategy leaves that to the module."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from lit_transformer.deferred import Draws
from lit_transformer.errors import UsageError
from lit_transformer.nn import TransformerConfig
from lit_transformer.nn.blocks import repeated_blocks
from lit_transformer.strategies import TensorParallel
from lit_transformer.tensor_parallel import cut


def shards(strategy: Strategy) -> bool:
    """Whether a strategy leaves each rank a part of the model only."""
    zero = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return zero or isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def saves_averages(strategy: Strategy) -> bool:
    """Whether a schedule-free optimizer's two sets of weights get into a checkpoint, and out of it."""
    if isinstance(strategy, TensorParallel):
        return strategy.group_size == 1 and strategy.saves_parts
    return not isinstance(strategy, FSDPStrategy | DeepSpeedStrategy)


def spread(
    model: nn.Module, config: TransformerConfig | None, strategy: Strategy, mesh: DeviceMesh | None, draws: Draws
) -> None:
    """Cut a model's blocks along heads and units, and shard its parameters over groups, where the strategy says so.

    Sharding is FSDP2 (Zhao et al. 2023; ``torch.distributed.fsdp.fully_shard``): a block's parameters are whole only
    while it computes. Parameters without memory get it on the way, those of a block at a time. Lightning's
    ``FSDPStrategy`` (FSDP1) is told to wrap blocks, unless it has a policy already. Under other strategies parameters
    get their memory, and no more; nothing happens the second time.

    Args:
        model: One of ours, or any that is stacked of blocks.
        config: Its configuration, if it is one of ours.
        strategy: The Trainer's.
        mesh: Its devices, if it has them in a mesh.
        draws: What fills parameters that have no memory yet.

    Raises:
        UsageError: If the number of devices in a group does not divide heads or hidden units, the model is none of
            ours, or the strategy does not know how cut weights are saved.
    """
    if isinstance(strategy, FSDPStrategy):
        policy = ModuleWrapPolicy({type(block) for block in repeated_blocks(model)})
        strategy.kwargs.setdefault("auto_wrap_policy", policy)
    if not isinstance(strategy, ModelParallelStrategy):
        draws.fill(model)
        return
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return
    assert mesh is not None
    if mesh["tensor_parallel"].size() > 1:
        if config is None:
            raise UsageError("tensor_parallel is for models of ours, and not for Hugging Face's: use strategy fsdp2")
        if not isinstance(strategy, TensorParallel):
            raise UsageError(
                "tensor_parallel_size above 1 needs lit_transformer.strategies.TensorParallel, which saves cut weights "
                f"as whole ones, got {type(strategy).__name__}; change class_path of trainer.strategy"
            )
        cut(model, config, mesh["tensor_parallel"], draws)
        if mesh["data_parallel"].size() == 1:
            return
    for block in repeated_blocks(model):
        draws.fill(block)
        fully_shard(block, mesh=mesh["data_parallel"])
    draws.fill(model)
    fully_shard(model, mesh=mesh["data_parallel"])


def size_of(parameter: Tensor) -> int:
    """Elements of a parameter over all devices; ZeRO-3 leaves an empty one in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def whole_dims(model: nn.Module) -> dict[int, int]:
    """The number of dimensions of each parameter by its ``id``, also where FSDP1 or ZeRO-3 has left a piece of it.

    Args:
        model: What the strategy has made of the module.
    """
    dims = {id(parameter): len(getattr(parameter, "ds_shape", parameter.shape)) for parameter in model.parameters()}
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            flat = module._handle.flat_param
            assert flat._params is not None  # use_orig_params
            dims |= {id(parameter): len(shape) for parameter, shape in zip(flat._params, flat._shapes, strict=True)}
    return dims


def clip_by_norm(model: nn.Module, max_norm: float) -> bool:
    """Clip the gradient of the whole to a norm, if FSDP1 holds it in pieces: Lightning refuses that; whether it did."""
    if not isinstance(model, FullyShardedDataParallel):
        return False
    model.clip_grad_norm_(max_norm)
    return True


def give_up_whole(module: nn.Module) -> None:
    """Let FSDP2 give up parameters that a forward pass without a backward one has left whole.

    They would be used again after the optimizer's, which are in parts, have been changed.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def keep_whole(model: nn.Module, whole: bool) -> None:
    """Let each device have all parameters for as long as a model only computes, or no longer. On every rank alike.

    What a device computes then waits for no other. Nothing happens to a model that is not sharded.
    """
    for part in model.modules():
        if isinstance(part, FSDPModule):
            if whole:
                part.unshard()
            else:
                part.reshard()
            part.set_reshard_after_forward(not whole and part is not model, recurse=False)
