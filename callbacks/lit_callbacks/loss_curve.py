"""Is it learning?"""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_callbacks._curve import Curve
from lit_callbacks._deepspeed import step_follows
from lit_callbacks._events import run_folder
from lit_callbacks._facts import facts_of
from lit_callbacks._observer import Observer
from lit_callbacks._ranks import Measurement
from lit_callbacks.functional import centered_mean


class LossCurve(Observer):
    """Draw the training and validation loss of a run into its folder, with or without a logger.

    The training loss is that of an optimizer step: the mean over its micro-batches and over ranks, as ``training_step``
    returned it, whatever the module logs. With several optimizers it is the loss behind the first one. The validation
    loss is what the module logged under ``val_key`` or, failing that, under ``val_key`` with ``/`` replaced by ``_``.
    The picture, ``figures/<filename>`` in the run folder, is written when fit ends, also when it ends in an exception,
    once there are two points.

    Logs: nothing; the history goes into the picture and the checkpoint.

    Args:
        every_n_steps: Optimizer steps between points.
        filename: Name of the picture; its suffix chooses the format.
        val_key: Key of the validation loss in ``trainer.callback_metrics``.
        unit: Unit of the loss, for the axis label; cross-entropy is in nats.

    Raises:
        ValueError: If ``every_n_steps`` is below 1, or ``filename`` is not a plain file name.

    State: both curves, at most 2000 points each; beyond that every second point is dropped and half as many are taken.

    Cost: one read by the host on measured steps. Drawing takes about a second when fit ends; it needs matplotlib.

    Example:
        >>> LossCurve(every_n_steps=5, val_key="val/nll").filename
        'loss_curve.png'
    """

    serves_shards = True
    serves_zero = True

    def __init__(
        self,
        every_n_steps: int = 10,
        filename: str = "loss_curve.png",
        val_key: str = "val/loss",
        unit: str = "nats",
    ) -> None:
        super().__init__(every_n_steps)
        if Path(filename).name != filename:
            raise ValueError(f"filename must be a plain file name, got {filename!r}")
        self.filename = filename
        self.val_key = val_key
        self.unit = unit
        self.train = Curve()
        self.val = Curve()
        self._path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder while all ranks are here."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._path = run_folder(trainer) / "figures" / self.filename

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what lies ahead of where this fit begins."""
        super().on_train_start(trainer, pl_module)
        self.train.cut(trainer.global_step)
        self.val.cut(trainer.global_step + 1)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the shared facts see the loss."""
        facts_of(trainer).record_loss(self, trainer.global_step, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Due? Keep the loss of this step."""
        first = optimizer is trainer.optimizers[0] and step_follows(trainer)
        if first and self.cadence.due(trainer.global_step):
            self.report(trainer, pl_module, trainer.global_step, lambda: self._measure(trainer))

    def _measure(self, trainer: Trainer) -> Measurement:
        losses = facts_of(trainer).losses(trainer)
        return Measurement({"loss": losses.sum(), "count": losses.new_tensor(len(losses))} if len(losses) else {})

    def summarise(self, total: Measurement) -> dict[str, Tensor]:
        """The mean over micro-batches and ranks."""
        return {"loss": total.sums["loss"] / total.sums["count"]} if total.sums else {}

    def record(self, trainer: Trainer, pl_module: LightningModule, step: int, values: dict[str, float]) -> None:
        """Keep it."""
        self.train.add(step, values["loss"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the validation loss, if there is one."""
        metrics = trainer.callback_metrics
        value = metrics.get(self.val_key, metrics.get(self.val_key.replace("/", "_")))
        if value is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.val.add(trainer.global_step, float(value))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is: a run that failed is the one to look at."""
        super().on_exception(trainer, pl_module, exception)
        self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Both curves."""
        return {"train": self.train.state_dict(), "val": self.val.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the curves ended."""
        self.train = Curve(**state_dict["train"])
        self.val = Curve(**state_dict["val"])

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self._path is None or len(self.train.steps) < 2:
            return
        try:
            draw(self.train, self.val, self.unit, self._path)
        except (ImportError, OSError, ValueError) as error:
            rank_zero_warn(f"LossCurve could not draw {self._path}: {error}")


def draw(train: Curve, val: Curve, unit: str, path: Path) -> None:
    """Write the picture: raw loss as a thin line, its centred mean on top, validation as marked points."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ink, blue, orange = "#333333", "#3b6fb6", "#d9702b"
    figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    reach = len(train.values) // 40
    width, alpha = (0.8, 0.4) if reach else (1.8, 1.0)
    axes.plot(train.steps, train.values, color=blue, linewidth=width, alpha=alpha, label="training")
    if reach:
        mean = centered_mean(torch.tensor(train.values), reach).numpy()
        axes.plot(train.steps, mean, color=blue, linewidth=1.8, label=f"mean of {2 * reach + 1} points")
    if val.steps:
        axes.plot(
            val.steps, val.values, color=orange, linewidth=1.4, marker="o", markersize=4, markeredgecolor="white",
            markeredgewidth=0.6, label="validation", zorder=3,
        )  # fmt: skip
        if math.isfinite(val.values[-1]):
            axes.annotate(
                f"{val.values[-1]:.3f}", (val.steps[-1], val.values[-1]), xytext=(0, 7), textcoords="offset points",
                color=orange, ha="center", va="bottom", fontsize=9, fontweight="bold", annotation_clip=False,
            )  # fmt: skip
    if bad := [step for step, value in zip(train.steps, train.values, strict=True) if not math.isfinite(value)]:
        axes.plot(
            bad, [0.02] * len(bad), "x", color="#c0392b", markersize=5, label="not finite",
            transform=axes.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip
    axes.set_xlabel("optimizer steps", color=ink)
    axes.set_ylabel(f"loss ({unit})", color=ink)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")
    axes.tick_params(colors=ink, length=3)
    axes.legend(frameon=False, labelcolor=ink)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
