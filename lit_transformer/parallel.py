"""How a model is spread over devices, where the strategy leaves that to the module."""

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_transformer.deferred import Draws
from lit_transformer.errors import UsageError
from lit_transformer.nn import TransformerConfig
from lit_transformer.nn.stack import Block
from lit_transformer.strategies import TensorParallel
from lit_transformer.tensor_parallel import cut


def spread(
    model: nn.Module, config: TransformerConfig, strategy: Strategy, mesh: DeviceMesh | None, draws: Draws
) -> None:
    """Cut a model's blocks along heads and units, and shard its parameters over groups, where the strategy says so.

    Sharding is FSDP2 (Zhao et al. 2023; ``torch.distributed.fsdp.fully_shard``): a block's parameters are whole only
    while it computes. Parameters without memory get it on the way, those of a block at a time. Under other strategies
    that is all that happens, and nothing does the second time.

    Args:
        model: One of ours.
        config: Its configuration.
        strategy: The Trainer's.
        mesh: Its devices, if it has them in a mesh.
        draws: What fills parameters that have no memory yet.

    Raises:
        UsageError: If the number of devices in a group does not divide heads or hidden units, or the strategy does not
            know how cut weights are saved.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        draws.fill(model)
        return
    if any(isinstance(p, DTensor) for p in model.parameters()):
        return
    assert mesh is not None
    if mesh["tensor_parallel"].size() > 1:
        if not isinstance(strategy, TensorParallel):
            raise UsageError(
                "tensor_parallel_size above 1 needs lit_transformer.parallel.TensorParallel, which saves cut weights "
                f"as whole ones, got {type(strategy).__name__}; change class_path of trainer.strategy"
            )
        cut(model, config, mesh["tensor_parallel"], draws)
        if mesh["data_parallel"].size() == 1:
            return
    for module in model.modules():
        if isinstance(module, Block):
            draws.fill(module)
            fully_shard(module, mesh=mesh["data_parallel"])
    draws.fill(model)
    fully_shard(model, mesh=mesh["data_parallel"])
