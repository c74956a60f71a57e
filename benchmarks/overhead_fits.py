"""How the overhead benchmarks run and time fits: models, clocks around hooks, and callbacks that take turns."""

import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_callbacks._intercept import Listener
from lit_transformer.nn import Transformer, TransformerConfig

LAYERS, WIDTH, HEADS, LENGTH, VOCABULARY, BATCH = 6, 256, 8, 256, 512, 8
STEPS = 8


class LanguageModel(LightningModule):
    """A causal language model of 5 million parameters, or a very small one with as many layers."""

    def __init__(self, width: int = WIDTH, length: int = LENGTH) -> None:
        super().__init__()
        config = TransformerConfig(
            vocab_size=VOCABULARY, max_length=length, d_model=width, n_layers=LAYERS, n_heads=HEADS
        )
        self.model = Transformer(config)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Next-token loss."""
        (tokens,) = batch
        return F.cross_entropy(self.model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


class Tiny(LightningModule):
    """Next to nothing, so that what surrounds it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A number."""
        return self.layer(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


class OwnTime:
    """CPU seconds inside some functions; one that is called by another counts once."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        self._inside = False

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added up."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start
                self.calls += 1
                self._inside = False

        return wrapper

    def watch(self, callback: Callback) -> None:
        """Time the hooks that a callback has, what it does in the forward pass, and after the optimizer's step."""
        for name in hooks_of(callback):
            setattr(callback, name, self.timed(getattr(callback, name)))
        for name in ("on_module", "on_end", "after"):
            if hasattr(callback, name):
                setattr(callback, name, self.timed(getattr(callback, name)))
        if isinstance(callback, Listener):
            handlers = callback.handlers
            timed = self.timed
            callback.handlers = lambda: {f: timed(h) for f, h in handlers().items()}


def hooks_of(callback: Callback) -> list[str]:
    """Names of the hooks that a callback overrides."""
    names = [name for name in dir(Callback) if name.startswith("on_")]
    return [name for name in names if getattr(type(callback), name) is not getattr(Callback, name)]


class Empty(Callback):
    """Hooks with nothing in them, as many as most callbacks have: what is timed in them is the clock."""

    def on_train_batch_start(self, *args: Any) -> None:
        """Nothing."""

    def on_before_backward(self, *args: Any) -> None:
        """Nothing."""

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Nothing."""

    def on_train_batch_end(self, *args: Any) -> None:
        """Nothing."""


@dataclass
class Step:
    """CPU seconds of a step: inside the callbacks, in how many calls, in all, and until the next step begins."""

    own: float
    calls: int
    whole: float
    period: float = math.nan


class Begin(Callback):
    """First of all callbacks: a step begins."""

    def __init__(self, own: OwnTime) -> None:
        self.own, self.start = own, 0.0
        self.steps: list[Step] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Set the clocks to zero."""
        before, self.start = self.start, time.process_time()
        if self.steps:
            self.steps[-1].period = self.start - before
        self.own.seconds, self.own.calls = 0.0, 0


class End(Callback):
    """Last of all callbacks: a step is over. The next one may be with some other callbacks ``instead``."""

    def __init__(self, begin: Begin, instead: list[Callback], collect: bool) -> None:
        self.begin, self.instead, self.collect = begin, instead, collect
        self.lists: list[list[Callback]] = []

    def on_train_start(self, trainer: Trainer, *args: Any) -> None:
        """All callbacks have been set up; the first step is without those that come instead."""
        if self.instead:
            everyone = trainer.callbacks
            without = [callback for callback in everyone if callback not in self.instead]
            self.lists = [without, [self.begin, *self.instead, self], everyone]
            trainer.callbacks = without

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Read the clocks."""
        own = self.begin.own
        self.begin.steps.append(Step(own.seconds, own.calls, time.process_time() - self.begin.start))
        if self.collect:
            gc.collect()
        if self.lists:
            trainer.callbacks = self.lists[len(self.begin.steps) % 2]

    def on_train_end(self, trainer: Trainer, *args: Any) -> None:
        """All callbacks are torn down."""
        if self.lists:
            trainer.callbacks = self.lists[2]


class Alternate(Callback):
    """A peer that is switched on for every second step, before the clock starts, and off before that of the next."""

    on = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """On or off?"""
        if self.on:
            self.switch_off()
        self.on = batch_idx % 2 == 0
        if self.on:
            self.switch_on(trainer, pl_module)

    def switch_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look."""

    def switch_off(self) -> None:
        """Look no more."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss."""
        self.loss = loss


def fit(
    module: LightningModule,
    loader: DataLoader[Any],
    callbacks: list[Callback],
    folder: str,
    steps: int,
    logger: bool = True,
    timed: bool = True,
    instead: Sequence[Callback] = (),
) -> list[Step]:
    """Every step of a fit; every second one is with the callbacks that come instead, if there are such."""
    own = OwnTime()
    for callback in callbacks:
        if timed:
            own.watch(callback)
    alternating = [callback for callback in callbacks if isinstance(callback, Alternate)]
    others = [callback for callback in callbacks if not isinstance(callback, Alternate)]
    begin = Begin(own)
    end = End(begin, list(instead), collect=logger)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*alternating, begin, *others, *instead, end],
        logger=CSVLogger(folder) if logger else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    gc.collect()
    gc.disable()
    try:
        with quiet():
            trainer.fit(module, loader)
    finally:
        gc.enable()
    return begin.steps


def fit_language_model(callbacks: list[Callback], folder: str, steps: int = STEPS) -> list[Step]:
    """Every step of a fit of the language model."""
    seed_everything(0, verbose=False)
    tokens = torch.randint(VOCABULARY, (BATCH * steps, LENGTH + 1))
    return fit(LanguageModel(), DataLoader(TensorDataset(tokens), batch_size=BATCH), callbacks, folder, steps)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what peers print."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        saved, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = saved


def of_the_clock(steps: Sequence[Step]) -> float:
    """Seconds that a call in a fit with an empty callback seems to take."""
    return statistics.median(step.own / step.calls for step in steps)


def beside(values: Sequence[float], i: int) -> float:
    """Mean of the two beside the i-th."""
    return (values[i - 1] + values[i + 1]) / 2


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
