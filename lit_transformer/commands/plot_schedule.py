"""``plot_schedule``: what will the learning rate be?"""

from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lit_callbacks.recipe import learning_rates
from lit_transformer.commands.prepared import Enough, PreparedCLI, Visit
from lit_transformer.optim.total_steps import total_steps

_POINTS = 2000


def main(words: list[str]) -> None:
    """Write the picture, and print where the curve turns.

    Raises:
        UsageError: For anything wrong in the words or the configuration.
    """

    def options(parser: LightningArgumentParser) -> None:
        parser.add_argument("--to", type=str, default="schedule.png", help="The picture.")

    def look(trainer: Trainer, module: LightningModule) -> None:
        plot(trainer, module, Path(cli.settings.to))

    cli = PreparedCLI(words, options, Visit(look))
    try:
        cli.start()
    except Enough:
        return


def plot(trainer: Trainer, module: LightningModule, path: Path) -> None:
    """The learning rate of each group over the updates of the run, right before its first."""
    from matplotlib.figure import Figure

    steps = total_steps(trainer)
    schedule: Any = getattr(module, "schedule", None)
    turns = {} if schedule is None else schedule.turning_points(steps)
    turns = {"first update": 0, **turns, "last update": steps - 1}
    at = sorted({*np.linspace(0, steps - 1, min(steps, _POINTS)).astype(int).tolist(), *turns.values()} - {steps})
    configs = trainer.lr_scheduler_configs
    rates = learning_rates(trainer.optimizers[0], configs[0].scheduler if configs else None, at)
    names = [str(group.get("name", i)) for i, group in enumerate(trainer.optimizers[0].param_groups)]

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    curves: dict[tuple[float, ...], list[str]] = {}
    for name, values in zip(names, rates, strict=True):
        curves.setdefault(tuple(values), []).append(name)
    for curve, same in curves.items():
        axes.plot(at, curve, label=", ".join(same))
    for name, step in turns.items():
        if 0 < step < steps - 1:
            axes.axvline(step, color="grey", linewidth=0.8, linestyle=":")
            axes.annotate(f" {name}", (step, 0), rotation=90, fontsize=8, color="dimgrey")
    axes.set(xlabel="update", ylabel="learning rate", title=f"{type(schedule).__name__}, {steps:,} updates")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

    highest = max(range(len(rates)), key=lambda i: max(rates[i]))
    print(f"{steps:,} updates; learning rates of group {names[highest]}:")
    for name, step in turns.items():
        print(f"  {name:15} {step:>9,}   {rates[highest][at.index(step)]:.3g}")
    print(f"Picture: {path}")
