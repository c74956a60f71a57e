"""Rehearse: the same run three times, undisturbed, with faults, and with faults and LossSpikeRecovery. One picture.

Three things go wrong in a language model of 0.2 M parameters: ten batches whose labels are shuffled, three steps at
sixty times the learning rate, and a bit of one weight that flips. Gradients are clipped at 1.0 in all three runs.

    make rehearse          # or: python benchmarks/rehearse.py, some two minutes on two cores
"""

from pathlib import Path

import torch
from fault_runs import Result, run
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_callbacks import LossSpikeRecovery
from lit_callbacks.testing import Fault

OUT = Path(__file__).parents[1] / "docs" / "rehearsal.png"
FAULTS = {
    "labels shuffled,\n10 batches": Fault("shuffled_labels", step=120, n_steps=10),
    "learning rate x60,\n3 steps": Fault("learning_rate", step=200, n_steps=3, factor=60.0),
    "one bit\nflipped": Fault("bit_flip", step=280),
}
COLORS = {"undisturbed": "#2a7f3f", "with faults": "#c0392b", "with faults and LossSpikeRecovery": "#1f4e9c"}
INK, GRID, HIGHEST = "#333333", "#e6e6e6", 7.0


def draw(results: dict[str, Result]) -> None:
    """The three losses by step, and where the faults are."""
    figure = Figure(figsize=(8.2, 3.3), dpi=110, layout="constrained")
    axes: Axes = figure.add_subplot()
    for name, result in results.items():
        steps, losses = zip(*result.curve, strict=True)
        ours = name == "with faults and LossSpikeRecovery"
        label = f"{name}: {result.loss:.3f}"
        axes.plot(
            steps, losses, linewidth=1.3 if ours else 1.1, color=COLORS[name], label=label, zorder=3 if ours else 2
        )
    for text, fault in FAULTS.items():
        axes.axvline(fault.step, color="#999999", linewidth=0.8, linestyle=":", zorder=1)
        axes.text(fault.step + 3, HIGHEST - 0.1, text, fontsize=8, color=INK, va="top")
    axes.set_ylim(1.5, HIGHEST)
    axes.set_xlim(0, len(results["undisturbed"].curve))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.set_xlabel("optimizer steps", fontsize=9, color=INK)
    axes.set_title("training loss, nats per token", fontsize=9, color=INK, loc="left")
    axes.legend(
        title="final validation loss", loc="upper left", bbox_to_anchor=(0.045, 0.86), alignment="left",
        frameon=False, fontsize=8, title_fontsize=8,
    )  # fmt: skip
    figure.savefig(OUT)


def main() -> None:
    """Run three times, print three losses, draw one picture."""
    torch.set_num_threads(2)
    faults = list(FAULTS.values())
    results = {
        "undisturbed": run(seed=0, callbacks=[], faults=[]),
        "with faults": run(seed=0, callbacks=[], faults=faults),
        "with faults and LossSpikeRecovery": run(seed=0, callbacks=[LossSpikeRecovery()], faults=faults),
    }
    for name, result in results.items():
        print(f"{name + ':':36}{result.loss:.3f} nats per token on held-out text, after {result.steps} steps")
    print("what LossSpikeRecovery did:", ", ".join(f"{action} at {step}" for step, action in results[name].actions))
    draw(results)
    print(f"{OUT.relative_to(Path.cwd()) if OUT.is_relative_to(Path.cwd()) else OUT}")


if __name__ == "__main__":
    main()
