"""How a model is spread over devices, where the strategy leaves that to the module."""

from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lit_transformer.errors import UsageError
from lit_transformer.nn.stack import Block


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism over all devices: Lightning's ``ModelParallelStrategy`` without a size to set.

    Also as ``strategy="fsdp2"``.

    Args:
        save_distributed_checkpoint: Whether a checkpoint is a folder with each rank's part, which may be loaded on
            another number of ranks; else one file, that the first rank collects.
    """

    def __init__(self, save_distributed_checkpoint: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint)

    def setup_environment(self) -> None:
        """Lightning's own default is one part per machine."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


StrategyRegistry.register("fsdp2", FSDP2, description="Parameters, gradients and optimizer states in parts")


def shards(strategy: Strategy) -> bool:
    """Whether a strategy leaves each rank a part of the model only."""
    zero = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return zero or isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def spread(model: nn.Module, strategy: Strategy, mesh: DeviceMesh | None) -> None:
    """Shard a model's parameters, gradients and optimizer states over the data-parallel devices, block by block.

    That is FSDP2 (Zhao et al. 2023; ``torch.distributed.fsdp.fully_shard``): a block's parameters are whole only while
    it computes. Lightning's ``FSDPStrategy`` (FSDP1) is told to wrap blocks, unless it has a policy already. Nothing
    happens under other strategies, or the second time.

    Args:
        model: One of ours.
        strategy: The Trainer's.
        mesh: Its devices, if it has them in a mesh.

    Raises:
        UsageError: If the mesh has a tensor-parallel dimension.
    """
    if isinstance(strategy, FSDPStrategy):
        strategy.kwargs.setdefault("auto_wrap_policy", ModuleWrapPolicy({Block}))
    if not isinstance(strategy, ModelParallelStrategy) or isinstance(model, FSDPModule):
        return
    assert mesh is not None
    if (degree := mesh["tensor_parallel"].size()) > 1:
        raise UsageError(
            f"tensor_parallel_size is {degree}, and our blocks are not cut along their heads yet: set it to 1, and "
            "data_parallel_size to the number of devices"
        )
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def size_of(parameter: Tensor) -> int:
    """Elements of a parameter over all devices; ZeRO-3 leaves an empty one in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def whole_dims(model: nn.Module) -> dict[int, int]:
    """The number of dimensions of each parameter by its ``id``, also where FSDP1 has left a flat piece of it.

    Args:
        model: What the strategy has made of the module.
    """
    dims = {id(parameter): parameter.ndim for parameter in model.parameters()}
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
