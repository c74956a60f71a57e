"""What DeepSpeed's engine has to be told, so that it trains by the same recipe as every other strategy."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import nn

from lit_transformer.errors import UsageError
from lit_transformer.optim.total_steps import total_steps
from lit_transformer.strategies.deferred import Draws


def prepare(strategy: Strategy) -> None:
    """Let DeepSpeed take any optimizer to the CPU, not only its own, which has to be compiled first.

    To be called before the engine is made. A configuration that says otherwise stands.
    """
    if isinstance(strategy, DeepSpeedStrategy) and isinstance(strategy.config, dict):
        strategy.config.setdefault("zero_force_ds_cpu_optimizer", False)


def partition(strategy: DeepSpeedStrategy, blocks: Sequence[nn.Module], draws: Draws) -> None:
    """Let ZeRO-3 cut the strategy's module into pieces as it gets its weights, those of a block at a time.

    Of a module in pieces the engine takes for granted what it does to a whole one (DeepSpeed 0.19): that parameters
    have the dtype of training, and that buffers are on the device.

    Args:
        strategy: With its configuration and module.
        blocks: The parts of the module that are large.
        draws: What fills parameters that have no memory yet.
    """
    import deepspeed

    module = strategy.lightning_module
    assert module is not None
    pieces = partial(deepspeed.zero.Init, config_dict_or_path=strategy.config)
    dtype = pieces().dtype
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    for part in (*blocks, module):
        draws.fill(part)
        pieces(module=part)
    module.to(strategy.root_device)


def settle_accumulation(trainer: Trainer) -> None:
    """Let Lightning and DeepSpeed agree on accumulated gradients. Nothing to do under other strategies.

    Lightning divides the loss by ``accumulate_grad_batches``, and DeepSpeed's engine once more (lightning 2.6):
    gradients would be that much too small, and clipped by a bound that much too high. Here the engine does not.

    Args:
        trainer: At the start of training.

    Raises:
        UsageError: If an epoch ends in the middle of a window: the engine carries that over into the next one, while
            Lightning begins to count anew, and from then on they step at different batches.
    """
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return
    window, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    if math.isfinite(batches) and batches % window and total_steps(trainer) > batches // window:
        raise UsageError(
            f"an epoch has {batches} batches and an optimizer step takes {window}: DeepSpeed needs a whole number of "
            f"steps in an epoch. Set trainer.limit_train_batches to {batches - batches % window}, or another "
            "accumulate_grad_batches"
        )
    engine: Any = trainer.strategy.deepspeed_engine
    engine.backward = partial(engine.backward, scale_wrt_gas=False)
