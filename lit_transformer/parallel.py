"""How a model is spread over devices, where the strategy leaves that to the module."""

import math
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

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


def spread(model: nn.Module, strategy: Strategy, mesh: DeviceMesh | None) -> None:
    """Shard a model's parameters, gradients and optimizer states over the data-parallel devices, block by block.

    That is FSDP2 (Zhao et al. 2023; ``torch.distributed.fsdp.fully_shard``): a block's parameters are whole only while
    it computes. Nothing happens under other strategies, or the second time.

    Args:
        model: One of ours.
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
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def shards_weights(strategy: Strategy) -> bool:
    """Whether no device has a whole model: all compute together, or none can."""
    zero = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return zero or isinstance(strategy, ModelParallelStrategy)


def size_of(parameter: Tensor) -> int:
    """Elements of a parameter over all devices; ZeRO-3 leaves an empty one in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def prepare(strategy: Strategy) -> None:
    """Let DeepSpeed take any optimizer to the CPU, not only its own, which has to be compiled first.

    To be called before the engine is made. A configuration that says otherwise stands.
    """
    if isinstance(strategy, DeepSpeedStrategy) and isinstance(strategy.config, dict):
        strategy.config.setdefault("zero_force_ds_cpu_optimizer", False)


def settle_accumulation(trainer: Trainer, total_steps: int) -> None:
    """Let Lightning and DeepSpeed agree on accumulated gradients. Nothing to do under other strategies.

    Lightning divides the loss by ``accumulate_grad_batches``, and DeepSpeed's engine once more (lightning 2.6):
    gradients would be that much too small, and clipped by a bound that much too high. Here the engine does not.

    Args:
        trainer: At the start of training.
        total_steps: Optimizer steps of the run.

    Raises:
        UsageError: If an epoch ends in the middle of a window: the engine carries that over into the next one, while
            Lightning begins to count anew, and from then on they step at different batches.
    """
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return
    window, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if math.isfinite(batches) and batches % window and total_steps > batches // window:
        raise UsageError(
            f"an epoch has {batches} batches and an optimizer step takes {window}: DeepSpeed needs a whole number of "
            f"steps in an epoch. Set trainer.limit_train_batches to {batches - batches % window}, or another "
            "accumulate_grad_batches"
        )
    engine: Any = trainer.strategy.deepspeed_engine
    engine.backward = partial(engine.backward, scale_wrt_gas=False)
