"""How much does the learning rate matter? Pre-LN, post-LN, and pre-LN with QK-norm over seven rates. One picture.

The runs are those of `configs/default.yaml`, from one seed; only the placement of the norm, or QK-norm, differs.

    python benchmarks/lr_sensitivity.py    # some forty minutes on two cores
"""

from pathlib import Path

from lr_sweep import RATES, final_loss, mean_excess, quiet
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OUT = Path(__file__).parents[1] / "docs" / "lr_sensitivity.png"
RECIPES = {
    "pre-LN": ["--config", "default"],
    "post-LN": ["--config", "post_ln"],
    "pre-LN with QK-norm": ["--config", "default", "--model.init_args.config.qk_norm", "true"],
}
LOOKS = {
    "pre-LN": ("#1f4e9c", "o", "-"),
    "post-LN": ("#c0392b", "s", "--"),
    "pre-LN with QK-norm": ("#2a7f3f", "^", "-"),
}
SEED = 1


def draw(results: dict[str, list[float]]) -> None:
    """Final loss over the learning rate; the legend has the mean excess."""
    figure = Figure(figsize=(6.4, 3.4), dpi=110, layout="constrained")
    axes: Axes = figure.add_subplot()
    for name, losses in results.items():
        color, marker, line = LOOKS[name]
        label = f"{name}: {mean_excess(losses):.3f}"
        axes.plot(RATES, losses, color=color, marker=marker, linestyle=line, linewidth=1.3, markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(RATES, [f"{rate:.2g}" for rate in RATES])
    axes.minorticks_off()
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors="#333333", length=3)
    axes.set_xlabel("learning rate", fontsize=9, color="#333333")
    axes.set_title("validation loss after 600 steps, nats per byte", fontsize=9, color="#333333", loc="left")
    axes.legend(title="mean above the best", alignment="left", frameon=False, fontsize=8, title_fontsize=8)
    figure.savefig(OUT)


def main() -> None:
    """Sweep, print and draw."""
    quiet()
    results = {}
    for name, recipe in RECIPES.items():
        results[name] = []
        for rate in RATES:
            results[name].append(final_loss(recipe, SEED, rate))
            print(f"{name}, {rate:.2g}: {results[name][-1]:.4f}", flush=True)
        print(f"{name}: best {min(results[name]):.4f}, mean excess {mean_excess(results[name]):.3f}", flush=True)
    draw(results)
    print(OUT)


if __name__ == "__main__":
    main()
