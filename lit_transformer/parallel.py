"""How a model is spread over devices, where the strategy leaves that to the module."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
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
        from torch.distributed.checkpoint import state_dict as whole  # takes a while to import

        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if self.optimizers:
            go_on(checkpoint)
        options = whole.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=module.strict_loading)
        whole.set_model_state_dict(module, checkpoint.pop("state_dict"), options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", ()), strict=False):
            whole.set_optimizer_state_dict(module, optimizer, _by_name(state, optimizer, module), options=options)
        return checkpoint


def _by_name(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimizer's state with the names of parameters in place of numbers, which follow the groups.

    Raises:
        UsageError: If it is of another number of parameters.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    own = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    saved = [number for group in state["param_groups"] for number in group["params"]]
    if len(saved) != len(own):
        raise UsageError(
            f"the checkpoint's optimizer has {len(saved)} parameters, and this run trains {len(own)}: go on with the "
            "param_groups that it was saved with"
        )
    by_number = dict(zip(saved, own, strict=True))
    return {
        "state": {by_number[number]: values for number, values in state["state"].items()},
        "param_groups": [g | {"params": [by_number[number] for number in g["params"]]} for g in state["param_groups"]],
    }


StrategyRegistry.register("fsdp2", FSDP2, description="Parameters, gradients and optimizer states in parts")


def spread(model: nn.Module, strategy: Strategy, mesh: DeviceMesh | None) -> None:
    """Shard a model's parameters, gradients and optimizer states over the data-parallel devices, block by block.

    That is FSDP2 (Zhao et al. 2023; ``torch.distributed.fsdp.fully_shard``): a block's parameters are whole only while
    it computes. Nothing happens under other strategies, or the second time.

    Args:
        model: One of ours, or any that is stacked of blocks.
        strategy: The Trainer's.
        mesh: Its devices, if it has them in a mesh.

    Raises:
        UsageError: If the mesh has a tensor-parallel dimension.
    """
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
