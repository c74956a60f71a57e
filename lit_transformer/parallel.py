"""How a model is spread over devices, where the strategy leaves that to the module."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer

from lit_transformer.errors import UsageError
from lit_transformer.nn.blocks import repeated_blocks
from lit_transformer.optim.schedule_free import go_on


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

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Of a file that one process wrote, each rank takes its part.

        Lightning takes the numbers of an optimizer's states for places in the model (2.6), which they are in one group
        alone: with more, parameters would get each other's.
        """
        path, module = Path(self.broadcast(checkpoint_path)), self.lightning_module
        assert module is not None
        if path.is_dir():
            return super().load_checkpoint(path, weights_only)
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if self.optimizers:
            go_on(checkpoint)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=module.strict_loading)
        set_model_state_dict(module, checkpoint.pop("state_dict"), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", ()), strict=False):
            set_optimizer_state_dict(module, optimizer, _by_name(state, optimizer, module), options=options)
        return checkpoint


def _by_name(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimizer's state with the names of parameters in place of numbers, which follow the groups."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    own = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    saved = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(saved, own, strict=True))
    return {
        "state": {by_number[number]: values for number, values in state["state"].items()},
        "param_groups": [g | {"params": [by_number[number] for number in g["params"]]} for g in state["param_groups"]],
    }


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
        model: One of ours, or any that is stacked of blocks.
        strategy: The Trainer's.
        mesh: Its devices, if it has them in a mesh.

    Raises:
        UsageError: If the mesh has a tensor-parallel dimension.
    """
    if isinstance(strategy, FSDPStrategy):
        strategy.kwargs.setdefault(
            "auto_wrap_policy", ModuleWrapPolicy({type(block) for block in repeated_blocks(model)})
        )
    if not isinstance(strategy, ModelParallelStrategy) or isinstance(model, FSDPModule):
        return
    assert mesh is not None
    if (degree := mesh["tensor_parallel"].size()) > 1:
        raise UsageError(
            f"tensor_parallel_size is {degree}, and our blocks are not cut along their heads yet: set it to 1, and "
            "data_parallel_size to the number of devices"
        )
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh["data_parallel"])
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
