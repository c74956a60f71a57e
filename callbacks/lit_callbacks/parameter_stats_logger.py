"""How large are the weights, and how far does a step move them?"""

from collections.abc import Mapping

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_callbacks._deepspeed import engine_of
from lit_callbacks._errors import SetupError
from lit_callbacks._evaluation import EvaluationHooks
from lit_callbacks._events import run_folder
from lit_callbacks._facts import amp_scale, own_norms, own_weights
from lit_callbacks._histograms import Histogram, draw, histogram, show_histogram
from lit_callbacks._pictures import needs_files, save_picture
from lit_callbacks._ranks import Measurement
from lit_callbacks._shards import is_sharded, share_norms
from lit_callbacks._step_observer import Step, StepObserver


class ParameterStatsLogger(StepObserver, EvaluationHooks):
    r"""Log the norms of weights, and of the steps that the optimizer takes relative to them.

    The update ratio of a group is :math:`\lVert w_{t+1} - w_t \rVert_2 / \lVert w_t \rVert_2`, where the difference is
    the true one, taken across the optimizer's step: with weight decay, momentum, clipping and a skipped step as they
    were. About 1e-3 is usual for Adam in mid-training; much more is unstable, much less is hardly learning.

    Under DeepSpeed the weights are those in full precision, of which each rank has a part.

    With ``histograms``, W&B and TensorBoard loggers get one of the weights and one of the unclipped, unscaled,
    accumulated gradients of each group; values that are not finite cannot be in a histogram, so their number is logged
    beside it. For a logger that cannot show them, or none, the last ones are drawn when fit ends, as
    ``figures/histograms.png`` in the run folder.

    Logs, every ``every_n_steps`` optimizer steps, with ``_<i>`` at the end of each key if there are several optimizers;
    in ``validate`` and ``test`` the norms of the weights, once:
        param_norm/total: norm over all parameters of the optimizer. Also in ``trainer.callback_metrics``.
        param_norm/<group>: norm over a group.
        update_ratio/total: norm of the step over norm of the weights before it.
        update_ratio/<group>: the same of a group.
        param_nonfinite/<group>: NaNs and infinities among the weights of a group; with ``histograms`` only.
        grad_nonfinite/<group>: NaNs and infinities among the gradients of a group; with ``histograms`` only.

    Args:
        every_n_steps: Optimizer steps between measurements.
        groups: What ``<group>`` is, as in :class:`~lit_callbacks.GradientNormLogger`: layers and kinds by default.
        histograms: Also send histograms to the loggers that can show them.

    Raises:
        ValueError: If ``every_n_steps`` is below 1; at fit start if a glob matches nothing, or under a
            DeepSpeed without ZeRO or of another build than is known.

    State: none.

    Cost: on measured steps a copy of the trainable parameters for the length of the optimizer's step, three passes over
    them and one read by the host; histograms take some passes more and a read for each group.

    Example:
        >>> ParameterStatsLogger(groups=["kinds"]).histograms
        False
    """

    serves_shards = True
    serves_zero = True

    def __init__(self, every_n_steps: int = 50, groups: list[str] | None = None, histograms: bool = False) -> None:
        super().__init__(every_n_steps, groups)
        self.histograms = histograms
        self._last: dict[str, Histogram] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse histograms of what no rank has."""
        super().on_fit_start(trainer, pl_module)
        if self.histograms and (is_sharded(pl_module) or engine_of(trainer) is not None):
            raise SetupError(
                "ParameterStatsLogger(histograms=True) needs whole parameters, and each rank has a part of them here. "
                "Leave histograms out."
            )

    def before(self, trainer: Trainer, step: Step) -> None:
        """Keep the weights; and their histograms, while the gradient is not clipped."""
        assert self.parameter_groups is not None
        trained, weights = own_weights(trainer, step.optimizer)
        step.found["before"] = [weight.clone() for weight in weights]
        step.found["trained"] = trained
        step.found["present"] = set(self.parameter_groups.sort(trained))
        norms = own_norms(trainer, step.found["before"], trained)
        step.found["weights"] = self.parameter_groups.place(trained, norms)
        if self.histograms:
            self._show_histograms(trainer, step)

    def after(self, trainer: Trainer, step: Step) -> None:
        """The norm of the step, taken right after it."""
        assert self.parameter_groups is not None
        before = step.found.pop("before")
        trained, weights = own_weights(trainer, step.optimizer)
        torch._foreach_sub_(before, weights)
        step.found["updates"] = self.parameter_groups.place(trained, own_norms(trainer, before, trained))

    def _show_histograms(self, trainer: Trainer, step: Step) -> None:
        assert self.parameter_groups is not None
        scale = amp_scale(trainer) if getattr(step.optimizer, "_step_supports_amp_scaling", False) else None
        step.found["nonfinite"] = {}
        for name, members in self.parameter_groups.sort(step.found["trained"]).items():
            gradients = [p.grad if scale is None else p.grad / scale for p in members if p.grad is not None]
            for prefix, tensors in (("param", members), ("grad", gradients)):
                shown = histogram(tensors)
                step.found["nonfinite"][f"{prefix}_nonfinite/{name}{step.suffix}"] = float(shown.nonfinite)
                if tensors and trainer.is_global_zero:
                    key = f"{prefix}_histogram/{name}{step.suffix}"
                    show_histogram(trainer, step.number, key, shown)
                    self._last[key] = shown

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last histograms, where a logger could not show them."""
        last, self._last, folder = self._last, {}, run_folder(trainer)
        if last and needs_files(trainer):
            try:
                save_picture("histograms", draw(last), folder)
            except (ImportError, OSError) as error:
                rank_zero_warn(f"ParameterStatsLogger could not draw its histograms in {folder}: {error}")

    def found(self, trainer: Trainer, step: Step) -> Measurement:
        """Squares, which add up over ranks: each holds all parameters, so each gives its share."""
        if "before" in step.found:  # the step was not taken
            self.after(trainer, step)
        return self._squares(trainer, weights=step.found["weights"], updates=step.found["updates"])

    def _squares(self, trainer: Trainer, **norms: Tensor) -> Measurement:
        assert self.parameter_groups is not None
        sums = {}
        for name, values in norms.items():
            squares = values.square() / trainer.world_size
            sums[name] = torch.cat([squares.sum().view(1), self.parameter_groups.sums(squares)])
        return Measurement(sums)

    def summarise(self, total: Measurement) -> dict[str, Tensor]:
        """Norms and ratios, by name."""
        assert self.parameter_groups is not None
        suffix, nonfinite = "", {}
        present = set(self.parameter_groups.names)
        if self.step is not None:
            suffix, nonfinite = self.step.suffix, self.step.found.get("nonfinite", {})
            present = self.step.found["present"]
        weights = total.sums["weights"].sqrt()
        sets = {"param_norm": weights}
        if "updates" in total.sums:
            sets["update_ratio"] = total.sums["updates"].sqrt() / weights
        return {
            f"{metric}/{name}{suffix}": value
            for metric, values in sets.items()
            for name, value in zip(["total", *self.parameter_groups.names], values.unbind(), strict=True)
            if name == "total" or name in present
        } | {key: torch.tensor(value, device=weights.device) for key, value in nonfinite.items()}

    def summary(self, values: Mapping[str, float]) -> list[str]:
        """The norm of all weights."""
        return [key for key in values if key.startswith("param_norm/total")]

    def evaluation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the weights."""

        def measure() -> Measurement:
            norms = self._group(trainer, pl_module).place(
                list(pl_module.parameters()), share_norms(list(pl_module.parameters()))
            )
            return self._squares(trainer, weights=norms)

        self.report(trainer, pl_module, trainer.global_step, measure)
