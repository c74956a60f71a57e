"""What is different about a model of which each device has a part."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from lit_transformer.strategies.model_parallel import TensorParallel


def shards(strategy: Strategy) -> bool:
    """Whether a strategy leaves each rank a part of the model only."""
    zero = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return zero or isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def saves_averages(strategy: Strategy) -> bool:
    """Whether a schedule-free optimizer's two sets of weights get into a checkpoint, and out of it."""
    if isinstance(strategy, TensorParallel):
        return strategy.group_size == 1 and strategy.saves_parts
    return not isinstance(strategy, FSDPStrategy | DeepSpeedStrategy)


def is_in_pieces(model: nn.Module) -> bool:
    """Whether FSDP1 or ZeRO-3 has cut a model, which neither takes for ``fit`` a second time."""
    wrapped = any(isinstance(part, FullyShardedDataParallel) for part in model.modules())
    return wrapped or any(hasattr(parameter, "ds_numel") for parameter in model.parameters())


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
