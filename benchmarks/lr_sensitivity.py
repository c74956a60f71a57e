"""How much does the learning rate matter? Pre-LN, post-LN, and pre-LN with QK-norm over seven rates. One picture.

Small models (4 layers of width 64, 200 steps, clipping at 1, cosine after 20 steps of warm-up) are trained at learning
rates from 1e-3 to 1e-1. The *sensitivity* is the mean over the rates of how far the final validation
loss is above that of the best rate, clipped at that of guessing a byte (Wortsman et al. 2023, "Small-scale proxies").

    python benchmarks/lr_sensitivity.py --seeds 3    # some ten minutes on one core
"""

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from lr_sweep import mean_excess
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from norm_placement import HIGH, Recipe, train

from lit_transformer.data import LanguageModelingData

OUT = Path(__file__).parents[1] / "docs" / "lr_sensitivity.png"
RATES = [10 ** (-3 + i / 3) for i in range(7)]
WITHOUT, WITH = HIGH
RECIPES = [
    replace(WITHOUT, label="pre-LN", color="#1f4e9c"),
    replace(WITHOUT, label="post-LN", color="#c0392b", line="--", placement="post"),
    replace(WITH, label="pre-LN with QK-norm", color="#2a7f3f"),
]
MARKERS = dict(zip((recipe.label for recipe in RECIPES), "os^", strict=True))


def draw(results: dict[Recipe, list[float]], seeds: int) -> None:
    """Final loss over the learning rate; the legend has the sensitivity."""
    figure = Figure(figsize=(6.4, 3.4), dpi=110, layout="constrained")
    axes: Axes = figure.add_subplot()
    for recipe, losses in results.items():
        look = {"color": recipe.color, "linestyle": recipe.line, "marker": MARKERS[recipe.label]}
        axes.plot(
            RATES, losses, linewidth=1.3, markersize=4, label=f"{recipe.label}: {mean_excess(losses):.3f}", **look
        )
    axes.set_xscale("log")
    axes.set_xticks(RATES, [f"{rate:.1g}" for rate in RATES])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors="#333333", length=3)
    axes.set_xlabel("learning rate", fontsize=9, color="#333333")
    title = f"validation loss after 200 steps, nats per byte; seeds: {seeds}"
    axes.set_title(title, fontsize=9, color="#333333", loc="left")
    axes.legend(
        title="mean above the best rate", loc="center right", bbox_to_anchor=(1.0, 0.7), alignment="left",
        frameon=False, fontsize=8, title_fontsize=8,
    )  # fmt: skip
    figure.savefig(OUT)


def main() -> None:
    """Sweep, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    results: dict[Recipe, list[float]] = {}
    for recipe in RECIPES:
        means: list[float] = []
        excess: dict[int, list[float]] = {seed: [] for seed in seeds}
        for rate in RATES:
            for seed in seeds:
                data = LanguageModelingData(block_size=64, batch_size=recipe.batch_size, seed=seed)
                data.prepare_data()
                data.setup()
                loss = train(replace(recipe, lr=rate), seed, data).validation
                excess[seed].append(loss if math.isfinite(loss) else math.log(256))
            means.append(statistics.mean(losses[-1] for losses in excess.values()))
        results[recipe] = means
        row = " | ".join(f"{loss:.3f}" for loss in means)
        each = " / ".join(f"{mean_excess(losses):.3f}" for losses in excess.values())
        print(f"| {recipe.label} | {row} | {each} |", flush=True)
    draw(results, len(seeds))
    print(OUT)


if __name__ == "__main__":
    main()
