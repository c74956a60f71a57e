"""How a model is spread over devices, where the strategy leaves that to the module."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from lit_transformer.errors import UsageError
from lit_transformer.nn import TransformerConfig
from lit_transformer.nn.blocks import repeated_blocks
from lit_transformer.strategies.deferred import Draws
from lit_transformer.strategies.model_parallel import TensorParallel
from lit_transformer.strategies.tensor_parallel import cut
from lit_transformer.strategies.zero import partition


def spread(
    model: nn.Module, config: TransformerConfig | None, strategy: Strategy, mesh: DeviceMesh | None, draws: Draws
) -> None:
    """Cut a model's blocks along heads and units, and shard its parameters over groups, where the strategy says so.

    Sharding is FSDP2 (Zhao et al. 2023; ``torch.distributed.fsdp.fully_shard``): a block's parameters are whole only
    while it computes. Parameters without memory get it on the way, those of a block at a time. Lightning's
    ``FSDPStrategy`` (FSDP1) is told to wrap blocks, unless it has a policy already, and to fill each before it does.
    ZeRO-3 gets parameters without memory block by block. Under other strategies parameters get their memory, and no
    more; nothing happens the second time.

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
    deferred = any(parameter.is_meta for parameter in model.parameters())
    if isinstance(strategy, FSDPStrategy):
        policy = ModuleWrapPolicy({type(block) for block in repeated_blocks(model)})
        strategy.kwargs.setdefault("auto_wrap_policy", policy)
        if deferred:
            strategy.kwargs["param_init_fn"] = draws.fill
        return
    if isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3 and deferred:
        partition(strategy, repeated_blocks(model), draws)
        return
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
