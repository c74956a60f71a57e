"""What watching costs: every callback, other people's tools, and attention entropy against a materialised softmax.

Time is process CPU time with one thread, so that other work on the machine counts little; wandb's service, a process of
its own, does not count. Nothing is asserted. Three ways of measuring, from fine to coarse:

- *timed*: the time inside a callback's own functions (its hooks, what it does inside the forward pass and inside the
  optimizer's step), added up in each step of a real fit. For those that look into the forward pass it includes what it
  takes that all torch functions and modules pass by them, timed on a copy of the model whose tensors are next to
  nothing. A callback whose hooks are empty is timed the same way, and what that takes is subtracted: it is the clock's.
- *paired*: whole steps. In one fit every second step is measured, and each is compared with the mean of the two beside
  it: median and quartiles. The row of the empty callback shows how far from zero that may be by chance.
- *period*: from step to step of a fit of two parameters, where Lightning's part shows. Every second step is with the
  callback, the others are with an empty one, and each is compared with the two beside it.

The peers are run where they are installed, and otherwise listed with what would install them:

    python benchmarks/monitor_overhead.py                 # some ten minutes
    python benchmarks/monitor_overhead.py --only entropy  # or others, steps, default
"""

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from entropy_cost import print_entropy
from lightning.pytorch import Callback, LightningModule, Trainer
from overhead_fits import (
    BATCH,
    HEADS,
    LENGTH,
    VOCABULARY,
    Empty,
    LanguageModel,
    Step,
    Tiny,
    beside,
    fit,
    fit_language_model,
    hooks_of,
    of_the_clock,
    quartiles,
)
from overhead_peers import PEERS
from torch.utils.data import DataLoader

from lit_callbacks import (
    ActivationStatsMonitor,
    AttentionEntropyMonitor,
    DeadNeuronDetector,
    GradientNormLogger,
    LossCurve,
    NonFiniteGuard,
    ParameterStatsLogger,
    ThroughputLogger,
    recommended,
)
from lit_callbacks._intercept import Interceptor, Listener

DEFAULT, NEVER = 50, 10**9
WARMUP, ROUNDS = 2, 2
TINY_WARMUP, TINY_STEPS, TINY_ROUNDS = 100, 1200, 2

Makers = dict[str, Callable[[int], list[Callback]]]

CALLBACKS: Makers = {
    "ThroughputLogger": lambda every: [ThroughputLogger(every)],
    "GradientNormLogger": lambda every: [GradientNormLogger(every)],
    "AttentionEntropyMonitor": lambda every: [AttentionEntropyMonitor(every)],
    "DeadNeuronDetector": lambda every: [DeadNeuronDetector(every)],
    "ActivationStatsMonitor": lambda every: [ActivationStatsMonitor(every)],
    "ParameterStatsLogger": lambda every: [ParameterStatsLogger(every)],
    "LossCurve": lambda every: [LossCurve(every)],
    "NonFiniteGuard": lambda every: [NonFiniteGuard()],
}
EMPTY = "an empty callback"
DEFAULT_CADENCE = {"LossCurve": 10, "NonFiniteGuard": 1}


# --- measured steps


def toggled(callback: Callback) -> Callback:
    """A callback that measures on every step, made to do so on every second one: its hooks are left out on others."""
    state = {"on": True}

    def only_if_on(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: hook(*args, **kwargs) if state["on"] else None

    for name in hooks_of(callback):
        if name not in ("on_train_start", "on_fit_start", "on_exception"):
            setattr(callback, name, only_if_on(getattr(callback, name)))
    start = callback.on_train_batch_start

    def on_train_batch_start(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        state["on"] = batch_idx % 2 == 0
        start(trainer, pl_module, batch, batch_idx)

    callback.on_train_batch_start = on_train_batch_start
    return callback


@dataclass
class Samples:
    """What the steps of several fits have shown, in seconds; ratios are of a measured step to those beside it."""

    measured: list[Step] = field(default_factory=list)
    others: list[Step] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def add(self, steps: Sequence[Step], odd: bool) -> None:
        """Take the steps of a fit; ``odd`` says which are measured."""
        whole = [step.whole for step in steps]
        for i in range(WARMUP, len(steps) - 1):
            if i % 2 == odd:
                self.measured.append(steps[i])
                self.ratios.append(whole[i] / beside(whole, i))
            else:
                self.others.append(steps[i])


def own_time(steps: Sequence[Step], clock: float) -> float:
    """Median seconds inside the callbacks."""
    return statistics.median(step.own - clock * step.calls for step in steps)


class Deaf(Listener):
    """Listens to what another listener wants to hear, and does nothing about it."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.functions = [function for listener in listeners for function in listener.handlers()]

    def handlers(self) -> dict[Callable[..., Any], Callable[[Any], None]]:
        """Nothing after each function."""
        return dict.fromkeys(self.functions, lambda _: None)


def interception(callbacks: Sequence[Callback]) -> float:
    """Seconds that a forward pass takes longer because somebody listens."""
    listeners = [c for c in callbacks if isinstance(c, Listener) and not isinstance(c, ThroughputLogger)]
    if not listeners:
        return 0.0
    module, interceptor, deaf = LanguageModel(width=2 * HEADS, length=4), Interceptor(), Deaf(listeners)
    tokens = torch.randint(VOCABULARY, (1, 5))
    differences = []
    for _ in range(150):
        times = []
        for listens in (False, True):
            if listens:
                interceptor.add(deaf, module)
            start = time.process_time()
            loss = module.training_step([tokens], 0)
            times.append(time.process_time() - start)
            interceptor.remove(deaf)
            loss.backward()
        differences.append(times[1] - times[0])
    return statistics.median(differences[20:])


@dataclass
class Row:
    """What the table says of one callback or peer, in seconds; ``timed`` is None for what cannot be timed."""

    name: str
    samples: Samples
    every: int
    timed: float | None
    other: float

    def line(self, step: float, others: str) -> str:
        """A row of the table, given the seconds of a step and the cells about other steps."""
        low, middle, high = quartiles([100 * (ratio - 1) for ratio in self.samples.ratios])
        seconds = step * middle / 100 if self.timed is None else self.timed
        mean = (seconds + self.other * (self.every - 1)) / self.every
        measured = (
            f"{seconds * 1e3:.0f} | -" if self.timed is None else f"{seconds * 1e3:.2f} | {100 * seconds / step:.2f}"
        )
        paired = f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
        return f"| {self.name} | {others} | {measured} | {paired} | {self.every} | {100 * mean / step:.3f} |"


def every_callback(every: int) -> list[Callback]:
    """One of each, all with the same cadence."""
    return [callback for make in CALLBACKS.values() for callback in make(every)]


def measure_steps(folder: str) -> tuple[list[Row], float, float]:
    """A row for each callback and peer; the seconds of a step; those that ThroughputLogger's first one takes longer."""
    ours: Makers = {EMPTY: lambda _: [Empty()], **CALLBACKS, "all of these": every_callback}
    makers: dict[str, Callable[[], list[Callback]]] = {name: lambda make=make: make(2) for name, make in ours.items()}
    makers["NonFiniteGuard"] = lambda: [toggled(NonFiniteGuard())]
    peers = [peer for peer in PEERS if peer.installed]
    makers |= {peer.name: lambda peer=peer: [peer.make(folder)] for peer in peers}
    # Where the even steps are not those that are measured.
    odd = {"ThroughputLogger", *(peer.name for peer in peers if peer.package == "wandb")}

    fit_language_model([], folder, steps=2)
    samples = {name: Samples() for name in makers}
    first: dict[str, list[float]] = {name: [] for name in makers}
    names = list(makers)
    for turn in range(ROUNDS):
        for name in names[:: (-1) ** turn]:
            steps = fit_language_model(makers[name](), folder)
            samples[name].add(steps, name in odd)
            first[name].append(steps[0].whole)
    clock = of_the_clock([*samples[EMPTY].measured, *samples[EMPTY].others])
    whole = statistics.median(step.whole - step.own for sample in samples.values() for step in sample.others)
    rows = []
    for name, make in ours.items():
        timed = own_time(samples[name].measured, clock) + interception(make(2))
        other = 0.0 if name == "NonFiniteGuard" else own_time(samples[name].others, clock)
        rows.append(Row(name, samples[name], DEFAULT_CADENCE.get(name, DEFAULT), timed, other))
    for peer in peers:
        seconds = own_time(samples[peer.name].measured, clock) if peer.timed else None
        between = whole * (statistics.median(samples[peer.between].ratios) - 1) if peer.between else 0.0
        rows.append(Row(peer.name, samples[peer.name], peer.every, seconds, between))
    counting = statistics.median(first["ThroughputLogger"]) - statistics.median(first[EMPTY])
    return rows, whole, counting


def measure_default(folder: str) -> tuple[float, float]:
    """What all callbacks at their defaults add to the CPU time: over a whole period, and in its measured step."""
    clock = of_the_clock(fit_language_model([Empty()], folder)[WARMUP:])
    callbacks = recommended()
    # Steps 3 to 52: one multiple of 50 and five of 10; the throughput is reported after step 49.
    steps = fit_language_model(callbacks, folder, steps=DEFAULT + 3)[3:]
    own = [step.own - clock * step.calls for step in steps]
    own[DEFAULT - 3] += interception(callbacks)
    plain = [step.whole - step.own for step in steps]
    return sum(own) / sum(plain), own[DEFAULT - 3] / statistics.median(plain)


# --- steps on which nothing is due


@dataclass
class Other:
    """Microseconds of a step on which nothing is due: in the hooks, and of a period beyond an empty callback's."""

    own: float
    period: float


def measure_others(folder: str) -> dict[str, Other]:
    """Steps of a tiny fit on which nothing is due, by callback. NonFiniteGuard has no such steps."""
    makers: Makers = {EMPTY: lambda _: [Empty()], **CALLBACKS, "all of these": every_callback}
    steps: dict[str, list[Step]] = {name: [] for name in makers}
    periods: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(TINY_ROUNDS):
        for name in list(makers)[:: (-1) ** turn]:
            steps[name] += tiny_fit(makers[name](NEVER), folder, timed=True)
            period = [step.period for step in tiny_fit(makers[name](NEVER), folder, timed=False)]
            periods[name] += [period[i] - beside(period, i) for i in range(2, len(period) - 2, 2)]
    clock = of_the_clock(steps[EMPTY])
    return {name: Other(1e6 * own_time(steps[name], clock), 1e6 * statistics.median(periods[name])) for name in makers}


def tiny_fit(callbacks: list[Callback], folder: str, timed: bool) -> list[Step]:
    """Steps of a fit of two parameters; without a clock in the hooks, every second one is with empty callbacks."""
    loader = DataLoader(torch.randn(TINY_STEPS, 1))
    instead = [] if timed else [Callback() for _ in callbacks]
    return fit(Tiny(), loader, callbacks, folder, TINY_STEPS, logger=False, timed=timed, instead=instead)[TINY_WARMUP:]


# --- printing


def processor() -> str:
    """What the system says it is."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_steps(others: dict[str, Other], folder: str) -> None:
    """The table of callbacks and peers."""
    rows, step, counting = measure_steps(folder)
    size = sum(p.numel() for p in LanguageModel().parameters()) / 1e6
    shape = f"{size:.1f} M parameters, batch {BATCH} x {LENGTH} tokens, AdamW, fp32, one thread"
    print(f"{shape}: {step * 1e3:.0f} ms a step.")
    print("Other steps, in µs: in the hooks, in a fit of two parameters and in this one; a whole period of the former.")
    print("NonFiniteGuard measures on every step, so there it is its least cost.\n")
    print("| | tiny | this | period | measured step, ms | % | paired, % [quartiles] | every | % per step |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = "- | - | -"
        if row.name in others:
            other = others[row.name]
            this = f"{1e6 * row.other:.0f}" if row.every > 1 else "-"
            cells = f"{other.own:.1f} | {this} | {other.period:.1f}"
        print(row.line(step, cells))
    for peer in PEERS:
        if not peer.installed:
            print(f"| {peer.name} | not installed: `{peer.install}` | | | | | | | |")
    print(f"\nOnce per fit, for ThroughputLogger's count of operations: {counting * 1e3:.0f} ms.", flush=True)


def print_default(folder: str) -> None:
    """The line about all callbacks at their defaults."""
    share, measured = measure_default(folder)
    print(f"\nAll of recommended() at their defaults, over the {DEFAULT} steps of a fit that hold one measured step:")
    print(f"{100 * share:.2f} % of CPU time on top; the measured step takes {100 * measured:.1f} % longer.", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("others", "steps", "default", "entropy"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    only = arguments.only
    print(f"{processor()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        others = measure_others(folder) if only in (None, "others") else {}
        if only in (None, "steps"):
            print_steps(others, folder)
        elif others:
            print("| | in the hooks, µs | a whole period, µs |\n|---|---|---|")
            for name, other in others.items():
                print(f"| {name} | {other.own:.1f} | {other.period:.1f} |")
        if only in (None, "default"):
            print_default(folder)
        if only in (None, "entropy"):
            print_entropy(folder)


if __name__ == "__main__":
    main()
