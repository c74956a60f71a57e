"""Histograms of many tensors at once, for the loggers that can show them, and as a picture for the others."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_callbacks._pictures import logger_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 64


class Histogram(NamedTuple):
    """Counts in equally wide bins between the smallest and the largest finite value.

    Args:
        counts: ``BINS`` numbers of values.
        edges: ``BINS + 1`` edges.
        nonfinite: How many values are NaN or infinite, and so in no bin.
        total: Sum of the finite values.
        squares: Sum of their squares.
    """

    counts: list[float]
    edges: list[float]
    nonfinite: int
    total: float
    squares: float


def histogram(tensors: Sequence[Tensor]) -> Histogram:
    """The histogram of all elements of some tensors.

    Example:
        >>> h = histogram([torch.tensor([0.0, 64.0]), torch.tensor([64.0, float("nan")])])
        >>> h.counts[0], h.counts[-1], h.nonfinite
        (1.0, 2.0, 1)
    """
    values = [tensor.detach().reshape(-1).float() for tensor in tensors]
    finite = [v[v.isfinite()] for v in values]
    kept = [v for v in finite if len(v)]
    nonfinite = sum(len(v) for v in values) - sum(len(v) for v in finite)
    low, high = (float(min(v.min() for v in kept)), float(max(v.max() for v in kept))) if kept else (0.0, 0.0)
    if low == high:  # one value, or none: a bin around it
        low, high = low - 0.5, high + 0.5
    counts = torch.zeros(BINS, dtype=torch.float64)
    for v in kept:
        counts += torch.histc(v, BINS, low, high).to(counts.device, counts.dtype)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    total, squares = (sum(float(x) for x in parts) for parts in ([v.sum() for v in kept], [v.dot(v) for v in kept]))
    return Histogram(counts.tolist(), edges.tolist(), nonfinite, total, squares)


def show_histogram(trainer: Trainer, step: int, key: str, shown: Histogram) -> None:
    """Send a histogram to every logger that can show it. On rank zero only."""
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        kind = logger_kind(logger)
        if kind == "WandbLogger":
            import numpy as np
            import wandb

            picture = wandb.Histogram(np_histogram=(np.array(shown.counts), np.array(shown.edges)))
            logger.log_metrics({key: picture}, step=step)
        elif kind == "TensorBoardLogger":
            logger.experiment.add_histogram_raw(
                key, min=shown.edges[0], max=shown.edges[-1], num=int(sum(shown.counts)), sum=shown.total,
                sum_squares=shown.squares, bucket_limits=shown.edges[1:], bucket_counts=shown.counts, global_step=step,
            )  # fmt: skip


def draw(shown: Mapping[str, Histogram]) -> "Figure":
    """All of them in one picture, four in a row, for loggers that cannot show any."""
    from matplotlib.figure import Figure

    columns = 4
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3 * columns, 1.5 * rows), dpi=80)
    figure.subplots_adjust(0.03, 0.25 / rows, 0.97, 1 - 0.25 / rows, hspace=0.7)
    for place, (name, h) in enumerate(shown.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.stairs(h.counts, h.edges, fill=True, color="#3b6fb6")
        axes.set_title(name, fontsize=8)
        axes.set_yticks([])
        axes.tick_params(labelsize=6)
    return figure
