"""Draw the catalogue's pictures: one run of the default recipe, watched closely, and what each callback saw of it.

The feed-forward layers have ReLUs, so that units can die. Pictures go to ``callbacks/pictures``.

python benchmarks/pictures.py            # a few minutes on two cores
python benchmarks/pictures.py RUN        # of a run that is there already
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from lit_transformer.run.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 300, 5
WATCHED = (
    "gradient_norm_logger",
    "attention_entropy_monitor",
    "dead_neuron_detector",
    "activation_stats_monitor",
    "parameter_stats_logger",
    "throughput_logger",
)
INK, GRID = "#333333", "#e6e6e6"

Series = dict[str, list[tuple[int, float]]]


def train(folder: Path) -> Path:
    """The default recipe, with a ReLU so that units can die, and every observer measuring every few steps."""
    command = [sys.executable, str(ROOT / "cli.py"), "fit", "--run", "pictures"]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.max_steps", str(STEPS)]
    command += ["--model.init_args.config.activation", "relu"]
    command += [word for name in WATCHED for word in (f"--{name}.every_n_steps", str(EVERY))]
    subprocess.run(command, check=True)
    return folder / "pictures"


def layers(series: Series, section: str, pattern: str = r"(\d+)") -> dict[str, list[tuple[int, float]]]:
    """The series of a section that have a layer's number in their name, by that number."""
    found = {}
    for key, points in series.items():
        part, _, name = key.partition("/")
        if part == section and (number := re.search(pattern, name)):
            found[number[1]] = points
    return dict(sorted(found.items()))


def draw(path: Path, panels: list[tuple[str, dict[str, list[tuple[int, float]]], bool]]) -> None:
    """Panels side by side: a title, lines by name, and whether the axis is logarithmic."""
    figure = Figure(figsize=(3.6 * len(panels), 2.6), dpi=110, layout="constrained")
    for i, (title, lines, logarithmic) in enumerate(panels):
        axes: Axes = figure.add_subplot(1, len(panels), i + 1)
        numbered = all(name.isdigit() for name in lines)
        for j, (name, points) in enumerate(lines.items()):
            color = _viridis()(0.9 * j / max(len(lines) - 1, 1)) if numbered else f"C{j}"
            axes.plot(*zip(*points, strict=True), linewidth=1.3, color=color, label=name)
        axes.set_title(title, fontsize=9, color=INK)
        axes.set_yscale("log" if logarithmic else "linear")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=7, colors=INK, length=3)
        axes.set_xlabel("optimizer steps", fontsize=8, color=INK)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=7, title="layer" if numbered else None, title_fontsize=7)
    figure.savefig(path)


def _viridis() -> Callable[[float], object]:
    import matplotlib

    colors: Colormap = matplotlib.colormaps["viridis"]
    return colors


def main() -> None:
    """Train, unless a run is given, and draw."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(sys.argv[1]) if len(sys.argv) > 1 else train(Path(folder))
        series = read_metrics(run / "metrics.csv")
        out = ROOT / "callbacks" / "pictures"
        out.mkdir(exist_ok=True)
        for name in ("loss_curve", "heat_maps_grad_norm", "heat_maps_attention_entropy"):
            shutil.copy(run / "figures" / f"{name}.png", out / f"{name}.png")
    kinds = {kind: series[f"grad_norm/{kind}"] for kind in ("attention_in", "attention_out", "feed_forward_in")}
    whole = {name: series[f"grad_norm/{name}"] for name in ("total", "clipped")}
    draw(
        out / "gradient_norm_logger.png",
        [
            ("gradient norm", whole, True),
            ("by layer", layers(series, "grad_norm", r"layer_(\d+)"), True),
            ("by kind", kinds, True),
        ],
    )
    draw(
        out / "attention_entropy_monitor.png",
        [
            ("normalised entropy", layers(series, "attention_entropy"), False),
            ("largest logit", layers(series, "attention_logit_max"), True),
            ("attention to the first token", layers(series, "attention_first"), False),
        ],
    )
    draw(
        out / "dead_neuron_detector.png",
        [
            ("dead units, share", layers(series, "dead_neurons"), False),
            ("dormant units, share", layers(series, "dormant_neurons"), False),
        ],
    )
    draw(
        out / "activation_stats_monitor.png",
        [
            ("residual stream, RMS", layers(series, "residual", r"rms_\D*(\d+)"), False),
            ("largest element", layers(series, "residual", r"max_\D*(\d+)"), False),
            ("excess kurtosis", layers(series, "residual", r"kurtosis_\D*(\d+)"), False),
        ],
    )
    draw(
        out / "parameter_stats_logger.png",
        [
            ("norm of the weights", layers(series, "param_norm", r"layer_(\d+)"), False),
            ("step over weights", layers(series, "update_ratio", r"layer_(\d+)"), True),
        ],
    )
    times = {name: series[f"throughput/step_time_{name}"] for name in ("p50", "p95")}
    draw(
        out / "throughput_logger.png",
        [
            ("tokens per second", {"tokens": series["throughput/tokens_per_second"]}, False),
            ("seconds per step", times, False),
            ("share of a measured GEMM rate", {"gemm": series["throughput/gemm_utilization"]}, False),
        ],
    )


if __name__ == "__main__":
    main()
