"""Run a training step again on a batch it has seen, and leave no trace of it."""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from lit_callbacks._deepspeed import engine_of
from lit_callbacks._forward_state import ForwardState
from lit_callbacks._rng import set_rng_state
from lit_callbacks._shards import flat_parameters, settle
from lit_callbacks._window import MicroBatch

of_an_earlier_step: ContextVar[bool] = ContextVar("of_an_earlier_step", default=False)
"""Whether what is run again is not the step under way: then an injected fault of this step has no part in it."""


@contextmanager
def without_trace(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """What runs inside leaves buffers, metrics, random number generators, gradients (``p.grad``) and logs as they were.

    Inside, no parameter has a gradient yet, DDP does not reduce, and compiled modules run eagerly: nothing is compiled
    again, and hooks see every module. Training mode is left alone. What a ``training_step`` does to attributes of its
    own, to its batch or to a file is beyond this.

    Take gradients with ``torch.autograd.grad``. A ``backward()`` wakes what is hooked on accumulated gradients, such as
    DDP's search for unused parameters, which then fails in the next step.

    Args:
        trainer: The trainer.
        pl_module: Its module, between two of its forward passes; `trainer.model` may wrap it.
    """
    with ExitStack() as undo:
        undo.callback(ForwardState(pl_module, trainer.strategy.root_device).restore)
        undo.enter_context(_gradients_put_aside([*pl_module.parameters(), *flat_parameters(trainer)]))
        undo.callback(settle, trainer.strategy.model or pl_module)
        undo.enter_context(_silence(trainer, pl_module))
        if engine_of(trainer) is None:  # which has a `no_sync` that ZeRO refuses, and which waits for its own backward
            undo.enter_context(getattr(trainer.strategy.model, "no_sync", nullcontext)())
        # Importing the compiler takes seconds; where nobody has, nothing is compiled.
        if "torch._dynamo" in sys.modules:
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def training_loss(trainer: Trainer, pl_module: LightningModule, micro_batch: MicroBatch) -> Tensor:
    """The loss of ``training_step`` on a batch it has seen before, in the trainer's precision.

    Only to be called inside :func:`without_trace`. As the module returned it: neither divided by the accumulation nor
    scaled; with the random numbers of the first time; with a graph, unless gradients are off. The module itself is
    called, not DDP; but FSDP1 is.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        micro_batch: The batch, on the device already.

    Raises:
        RuntimeError: If there is no loss: ``training_step`` returned None, or draws its batches itself.
    """
    step = pl_module.training_step
    if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        raise RuntimeError("training_step draws its own batches from dataloader_iter, so it cannot be run again on one")
    # Some steps pop their labels out of the batch.
    batch = copy.copy(micro_batch.batch) if isinstance(micro_batch.batch, Mapping | list) else micro_batch.batch
    if micro_batch.generators is not None:
        set_rng_state(micro_batch.generators, trainer.strategy.root_device)
    with_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
    arguments = (batch, micro_batch.batch_idx) if with_index else (batch,)
    if isinstance(trainer.strategy.model, FullyShardedDataParallel):  # which puts the pieces together
        output = trainer.strategy.training_step(*arguments)
    else:
        with trainer.precision_plugin.train_step_context():
            output = step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise RuntimeError(f"training_step returned no loss but {type(output).__name__} when it was run again")
    return loss


@contextmanager
def _gradients_put_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def _silence(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    loggers = trainer.loggers
    own: dict[str, Any] = pl_module.__dict__
    patched: dict[str, Any] = {name: own[name] for name in ("log", "log_dict") if name in own}
    trainer.loggers = [_Silent(logger) for logger in loggers]  # type: ignore[misc]
    own |= {"log": _nothing, "log_dict": _nothing}
    try:
        yield
    finally:
        del own["log"], own["log_dict"]
        own.update(patched)
        trainer.loggers = loggers


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _Silent:
    """Stands in for a logger, or for what hangs on one: its names and numbers can be read, its methods do nothing."""

    def __init__(self, original: Any) -> None:
        self._original = original

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that `isinstance(self.logger, WandbLogger)` decides as it did the first time
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name)
        return value if value is None or isinstance(value, str | int | float | Path) else _Silent(value)

    def __getitem__(self, key: Any) -> Any:
        return _Silent(self._original[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass
