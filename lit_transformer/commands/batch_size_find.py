"""``batch_size_find``: the largest batch that fits, or on a CPU the smallest that is fast."""

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.parsing import lightning_getattr, lightning_hasattr, lightning_setattr
from torch import Tensor

from lit_transformer.commands.endings import out_of_memory
from lit_transformer.commands.prepared import Enough, PreparedCLI
from lit_transformer.errors import UsageError

_STEPS = 6  # of each size; the first is left out, and the median is of five
_MOST, _MOST_ON_CPU = 1024, 64
_AS_FAST = 0.95


def main(words: list[str]) -> None:
    """Print a line for each size tried, and the suggestion.

    Raises:
        UsageError: For anything wrong in the words or the configuration, or if not even one sample fits.
    """

    def options(parser: LightningArgumentParser) -> None:
        text = f"The largest size to try; by default {_MOST}, and {_MOST_ON_CPU} on a CPU."
        parser.add_argument("--max_batch_size", type=int | None, default=None, help=text)

    trials = Trials()
    # What fits on one device fits on each of several.
    cli = PreparedCLI([*words, "--trainer.devices", "1", "--trainer.num_nodes", "1"], options, trials)
    most = cli.settings.max_batch_size
    if most is not None and most < 1:
        raise UsageError(f"max_batch_size must be at least 1, got {most}")
    strategy = cli.trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy):
        kind = type(strategy).__name__
        raise UsageError(f"expected a strategy of one device, got {kind}: give --trainer.strategy auto")
    on_cpu = strategy.root_device.type == "cpu"
    trials.limit(most or (_MOST_ON_CPU if on_cpu else _MOST))
    with contextlib.suppress(Enough), _without_remarks():
        cli.start()
    if not trials.speeds:
        cli.settings.data.get("init_args", {})["batch_size"] = 1  # what the message says it is
        raise UsageError(f"not even one sample fits: {out_of_memory(RuntimeError(trials.refusal), cli.settings)}")
    size = fastest(trials.speeds) if on_cpu else max(trials.speeds)
    print(f"Suggested: --data.init_args.batch_size {size}")
    if on_cpu:
        print("That is the smallest size within 5 % of the highest speed.")
    print(trials.keep(size))


class Trials(BatchSizeFinder):
    """Lightning's search from one sample on, with a line for each size; ends with ``Enough``.

    Attributes:
        speeds: Samples per second of each size that fits.
        refusal: The last error of one that does not.

    Raises:
        UsageError: If there is no ``batch_size`` to change, or changing it changes nothing.
    """

    def __init__(self) -> None:
        super().__init__(mode="binsearch", steps_per_trial=_STEPS, init_val=1, max_trials=100, margin=0.0)
        self.speeds: dict[int, float] = {}
        self.refusal = ""
        self.configured, self.accumulation, self.target = 1, 1, math.inf
        self._marks: list[float] = []
        self._samples = 0

    def limit(self, most: int) -> None:
        """Try no size above this one."""
        self._max_val = most + 1  # Lightning does not try the last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str | None = None) -> None:
        """Check that there is something to change."""
        if not lightning_hasattr(pl_module, "batch_size"):
            data = type(trainer.datamodule).__name__  # type: ignore[attr-defined]
            raise UsageError(
                f"expected a data module with a batch_size, got {data}, which has none: give it this attribute, and "
                "make its loaders by it"
            )
        if getattr(trainer.datamodule, "max_tokens", None) is not None:  # type: ignore[attr-defined]
            raise UsageError(
                "max_tokens decides how many samples are in a batch, and batch_size nothing: leave max_tokens out to "
                "search for a batch_size"
            )
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Search."""
        pl_module.on_fit_start()  # which comes after ours, and the trials need it
        self.configured, self.accumulation = _size(pl_module), trainer.accumulate_grad_batches
        if (tokens := getattr(pl_module, "target_batch_tokens", None)) is not None:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self.target = tokens * self.configured / data.tokens_per_batch
        trainer.accumulate_grad_batches = 1
        trainer.fit_loop.max_epochs = -1  # a trial has all its steps, however small the data
        lightning_setattr(pl_module, "batch_size", 1)  # Lightning begins with the present one if that is all the data
        loop: Any = trainer.fit_loop
        run = loop.run
        loop.run = lambda: self._try(trainer, pl_module, run)
        memory = f"{'peak GiB':>12}" if _on_cuda(trainer) else ""
        print(f"{'batch':>7}{'ms a step':>12}{'samples a second':>19}{memory}", flush=True)
        super().on_fit_start(trainer, pl_module)
        raise Enough

    def _try(self, trainer: Trainer, module: LightningModule, run: Callable[[], None]) -> None:
        """One size, as Lightning has set it."""
        size = _size(module)
        trainer.callbacks = [self]  # type: ignore[attr-defined]  # Lightning has taken all away, and puts them back
        self._marks = []
        if _on_cuda(trainer):
            torch.cuda.reset_peak_memory_stats(module.device)
        try:
            run()
        except RuntimeError as error:
            if is_oom_error(error):
                self.refusal = str(error)  # the error itself would keep the memory
                print(f"{size:>7}{'out of memory':>31}", flush=True)
            raise
        size = self._samples  # fewer, if that is all the data
        seconds = statistics.median(b - a for a, b in pairwise(self._marks))
        self.speeds[size] = size / seconds
        gib = f"{torch.cuda.max_memory_allocated(module.device) / 2**30:>12.2f}" if _on_cuda(trainer) else ""
        print(f"{size:>7}{1000 * seconds:>12.1f}{self.speeds[size]:>19.1f}{gib}", flush=True)
        if trainer.num_training_batches == 1 and not self.refusal:
            print("An epoch is one batch: larger ones are not tried.")
            raise Enough

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check that the size is what was asked for."""
        if self._marks:
            return
        self._samples, size = extract_batch_size(batch), _size(pl_module)
        if self._samples != size and trainer.num_training_batches > 1:
            raise UsageError(
                f"expected a batch of {size} from batch_size={size}, got {self._samples} samples: the data module must "
                "make its loaders by its batch_size at that time"
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """With accumulation gradients are there before a backward pass: what fits shall fit with it as well."""
        for parameter in pl_module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """What lies between two ends is a step, with its loading."""
        device = pl_module.device
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        self._marks.append(time.perf_counter())

    def keep(self, size: int) -> str:
        """How a step of the recipe keeps its samples with this size, or what else to change."""
        if size == self.configured:
            return "The recipe has this size already."
        now = self.configured * self.accumulation
        if math.isfinite(self.target):
            if size <= self.target:
                return "target_batch_tokens keeps the tokens of a step, by accumulation."
            now = math.ceil(self.target)
        if size > now:
            return (
                f"A step then sees {size} samples on a device in place of {now}: the learning rate belongs to that "
                "number, and lr_find suggests another."
            )
        accumulation = math.ceil(now / size)
        return (
            f"With --trainer.accumulate_grad_batches {accumulation} a step sees {size * accumulation} samples on a "
            f"device; the recipe has {now}."
        )


def fastest(speeds: dict[int, float]) -> int:
    """The smallest size within 5 % of the highest speed.

    Example:
        >>> fastest({1: 50.0, 2: 96.0, 4: 100.0, 8: 90.0})
        2
    """
    return min(size for size, speed in speeds.items() if speed >= _AS_FAST * max(speeds.values()))


def _size(module: LightningModule) -> int:
    return int(lightning_getattr(module, "batch_size"))  # type: ignore[arg-type]  # which there is


def _on_cuda(trainer: Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Lightning has several for each size."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
