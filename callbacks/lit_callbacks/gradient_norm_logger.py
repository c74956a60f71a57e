"""How large is the gradient, where, and is it still a number?"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_callbacks._alarms import InARow, OwnPast, raise_alarm
from lit_callbacks._deepspeed import clip_factor, engine_of
from lit_callbacks._facts import facts_of, has_scaler
from lit_callbacks._member import Member
from lit_callbacks._ranks import Measurement
from lit_callbacks._shards import gradient, is_sharded, share_norms, whole_shapes
from lit_callbacks._step_observer import Step, StepObserver

SAMPLE = 4
"""Parameters that tell by how much all gradients have been scaled."""


class GradientNormLogger(StepObserver):
    r"""Log the norms of the gradient that an optimizer uses: before and after clipping, in all and by layer.

    The norm of a set of parameters is :math:`\sqrt{\sum_p \lVert g_p \rVert_2^2}` in fp32, where :math:`g_p` is the
    gradient after accumulation and averaging over ranks, with the factor of a GradScaler taken out. It is the quantity
    that ``gradient_clip_val`` bounds (Pascanu et al., ICML 2013, *On the difficulty of training recurrent neural
    networks*). In manual optimization, gradients that ``training_step`` clips itself are seen clipped.

    A group *vanishes* when the root mean square of its gradient's elements is below ``vanishing_rms``: near Adam's
    epsilon of 1e-8 updates shrink with the gradient (Wortsman et al. 2023, *Small-scale proxies for large-scale
    Transformer training instabilities*). It *explodes* when its norm is more than ``exploding_ratio`` times its own
    running median, or not finite. Two in a row of either, and a gradient that is not finite, are alarms: they go to
    ``events.jsonl`` in the run folder with the names of the groups or of the first offending parameter, and, the first
    time, to the console. Under a GradScaler a gradient that is not finite is no alarm.

    Logs, every ``every_n_steps`` optimizer steps; with several optimizers each key ends in ``_<i>``, their place in
    ``configure_optimizers``; NaN and infinity are logged as they are:
        grad_norm/total: norm over all parameters, before clipping. Also in ``trainer.callback_metrics``.
        grad_norm/clipped: the same after clipping; absent if the step was skipped.
        grad_norm/<group>: norm over a group, before clipping.
        grad_norm/rms: root mean square of all elements, before clipping.
        grad_norm/nonfinite: share of parameters whose gradient holds a NaN or an infinity.
        grad_norm/vanishing: number of groups that vanish.
        grad_norm/exploding: number of groups that explode.

    Args:
        every_n_steps: Optimizer steps between measurements.
        groups: What ``<group>`` is, any of: ``"layers"``, which gives ``layer_<i>``; ``"kinds"``, which gives
            ``attention_in``, ``attention_out``, ``feed_forward_in``, ``feed_forward_out``, ``norm``, ``embedding``,
            ``head`` and ``other``; ``"parameters"``, each by itself; globs over parameter names such as
            ``"*.q_proj.weight"``. Layers and kinds by default.
        vanishing_rms: Root mean square below which a group vanishes.
        exploding_ratio: Multiple of its running median above which a group explodes.

    Raises:
        ValueError: If an argument is out of range; at fit start if a glob matches nothing, or under a
            DeepSpeed without ZeRO or of another build than is known.

    State: the last 20 accepted norms of each group.

    Cost: on measured steps one pass over the gradients, a look at four of them after clipping (a second pass where
    something else than clipping by norm may have changed them), and one read by the host. Under DeepSpeed the same,
    over this rank's part: no gradient is gathered, and the norm after clipping follows from DeepSpeed's own.

    Example:
        >>> GradientNormLogger(every_n_steps=100, groups=["layers", "*.bias"]).every_n_steps
        100
    """

    serves_shards = True
    serves_zero = True

    def __init__(
        self,
        every_n_steps: int = 50,
        groups: list[str] | None = None,
        vanishing_rms: float = 1e-8,
        exploding_ratio: float = 10.0,
    ) -> None:
        super().__init__(every_n_steps, groups)
        if vanishing_rms < 0:
            raise ValueError(f"vanishing_rms must be at least 0, got {vanishing_rms}")
        if exploding_ratio <= 1:
            raise ValueError(f"exploding_ratio must be above 1, got {exploding_ratio}")
        self.vanishing_rms = vanishing_rms
        self.exploding_ratio = exploding_ratio
        self._past = OwnPast(window=20, least=5)
        self._vanishing, self._exploding = InARow(patience=2), InARow(patience=2)
        self._warned = False
        self._scaled_alike = False
        self._trained: tuple[int, ...] = ()
        self._elements, self._sizes = 0.0, list[float]()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See whether anything but clipping by norm can come between the gradient and the optimizer."""
        super().on_fit_start(trainer, pl_module)
        # A rank may have no part in any of a few.
        self._scaled_alike = _only_clips_by_norm(trainer, pl_module) and not is_sharded(pl_module)
        self._trained = ()

    def before(self, trainer: Trainer, step: Step) -> None:
        """The norm of each parameter's gradient."""
        assert self.parameter_groups is not None
        gradients = facts_of(trainer).gradients(trainer, step.optimizer)
        groups = self.parameter_groups
        # How many elements have a gradient, in all and by group; groups of another optimizer, or frozen, have none.
        trained = tuple(map(id, gradients.parameters))
        if trained != self._trained:
            assert trainer.lightning_module is not None
            shapes = whole_shapes(trainer, trainer.lightning_module)
            numbers = torch.tensor([float(shapes.get(id(p), p.shape).numel()) for p in gradients.parameters])
            self._trained, self._elements = trained, numbers.sum().item()
            self._sizes = groups.sums(groups.place(gradients.parameters, numbers)).tolist()
        used = gradients.parameters
        if self._scaled_alike:
            used = used[:: -(-len(used) // SAMPLE)]
        step.found = {
            "used": used,
            "sample": torch.linalg.vector_norm(gradients.norms[:: -(-len(gradients.norms) // SAMPLE)]),
            "norms": groups.place(gradients.parameters, gradients.norms),
            "total": gradients.total,
            "elements": self._elements,
            "parameters": len(gradients.parameters),
            "sizes": self._sizes,
        }

    def after(self, trainer: Trainer, step: Step) -> None:
        """The norm of what the optimizer used: of all, or of a few if they have only been scaled alike."""
        if (engine := engine_of(trainer)) is not None:  # which clips in its step, and keeps nothing of it
            if (factor := clip_factor(engine)) is not None:
                step.found["clipped"] = step.found["total"] * factor
            return
        if all(p.grad is None for p in step.found["used"]):
            return  # the step is skipped
        used = [(p, g) for p in step.found["used"] if (g := gradient(p)) is not None]
        # A fused optimizer has unscaled its gradients by now.
        norm = torch.linalg.vector_norm(share_norms([g for _, g in used], of=[p for p, _ in used]))
        if len(used) < step.found["parameters"]:
            factor = norm / step.found["sample"]
            norm = step.found["total"] * factor.where(step.found["sample"] > 0, 1.0)
        step.found["clipped"] = norm

    def found(self, trainer: Trainer, step: Step) -> Measurement:
        """Squares, which add up over ranks: each holds the whole gradient, or a part of it, and gives its share."""
        assert self.parameter_groups is not None
        found = step.found
        sums = {
            "groups": self.parameter_groups.sums(found["norms"].square()),
            "total": found["total"].square(),
        }
        if "clipped" in found:
            sums["clipped"] = found["clipped"].square()
        # One rank alone may have the part that is not finite.
        nonfinite = (~found["norms"].isfinite()).float()
        return Measurement({name: value / trainer.world_size for name, value in sums.items()}, {"nonfinite": nonfinite})

    def summarise(self, total: Measurement) -> dict[str, Tensor]:
        """The norms, by name."""
        assert self.parameter_groups is not None
        assert self.step is not None
        sums, found = total.sums, self.step.found
        values = {
            "total": sums["total"].sqrt(),
            "rms": (sums["total"] / max(found["elements"], 1)).sqrt(),
            "nonfinite": total.maxima["nonfinite"].sum() / max(found["parameters"], 1),
        }
        if "clipped" in sums:
            values["clipped"] = sums["clipped"].sqrt()
        norms = sums["groups"].sqrt().unbind()
        values |= {n: v for n, v, size in zip(self.parameter_groups.names, norms, found["sizes"], strict=True) if size}
        return {f"grad_norm/{name}{self.step.suffix}": value for name, value in values.items()}

    def record(self, trainer: Trainer, pl_module: LightningModule, step: int, values: dict[str, float]) -> None:
        """Judge each group by its own past, log, and raise the alarms."""
        assert self.parameter_groups is not None
        assert self.step is not None
        suffix = self.step.suffix
        sizes = zip(self.parameter_groups.names, self.step.found["sizes"], strict=True)
        norms = {f"{name}{suffix}": (values[f"grad_norm/{name}{suffix}"], size) for name, size in sizes if size}
        vanishes = {name: norm / math.sqrt(size) < self.vanishing_rms for name, (norm, size) in norms.items()}
        only_norms = {name: norm for name, (norm, _) in norms.items()}
        normal = self._past.medians(only_norms)
        explodes = {name: not norm <= self.exploding_ratio * normal[name] for name, norm in only_norms.items()}
        self._past.keep({name: norm for name, norm in only_norms.items() if not explodes[name]})
        values[f"grad_norm/vanishing{suffix}"] = float(sum(vanishes.values()))
        values[f"grad_norm/exploding{suffix}"] = float(sum(explodes.values()))
        super().record(trainer, pl_module, step, values)
        if not has_scaler(trainer) and values[f"grad_norm/nonfinite{suffix}"]:
            self._first_offender(trainer, step)
        if where := self._vanishing.judge(vanishes):
            raise_alarm(
                self.events, step, "gradient_vanishing", where,
                f"the gradient vanishes in {{where}}: its root mean square is below {self.vanishing_rms:g}, where "
                "Adam's epsilon begins to rule. Look at initialisation and norm placement.",
            )  # fmt: skip
        if where := self._exploding.judge(
            {name: bad and math.isfinite(norms[name][0]) for name, bad in explodes.items()}
        ):
            raise_alarm(
                self.events, step, "gradient_exploding", where,
                f"the gradient explodes in {{where}}: its norm has been above {self.exploding_ratio:g} times its "
                "running median twice in a row. Lower the learning rate, or clip with gradient_clip_val=1.0.",
            )  # fmt: skip

    def _first_offender(self, trainer: Trainer, step: int) -> None:
        assert self.parameter_groups is not None
        assert self.step is not None
        finite = self.step.found["norms"].isfinite().tolist()
        name = self.parameter_groups.parameters[finite.index(False)]
        self.events.write(step=step, event="alarm", alarm="gradient_not_finite", where=[name])
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"step {step}: the gradient is not finite; {name} is the first parameter where it is not.")

    def summary(self, values: Mapping[str, float]) -> list[str]:
        """The total; others may be monitored under the logger's key only."""
        return [key for key in values if key.startswith("grad_norm/total")]

    def state_dict(self) -> dict[str, Any]:
        """The past of each group."""
        return {
            "past": self._past.state_dict(),
            "vanishing": dict(self._vanishing.counts),
            "exploding": dict(self._exploding.counts),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on judging."""
        self._past.values = {name: list(values) for name, values in state_dict["past"].items()}
        self._vanishing.counts = dict(state_dict["vanishing"])
        self._exploding.counts = dict(state_dict["exploding"])


def _only_clips_by_norm(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether all gradients are scaled by one factor, or none, before the optimizer uses them.

    Not if the user's module or another callback has its own hands on them, or in manual optimization.
    """
    algorithm = getattr(trainer.gradient_clip_algorithm, "value", None)
    hooks = ("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
    own = any(_defined_outside_lightning(pl_module, hook) for hook in hooks)
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others = any(
        _defined_outside_lightning(callback, hooks[0]) for callback in callbacks if not isinstance(callback, Member)
    )
    return pl_module.automatic_optimization and algorithm in (None, "norm") and not own and not others


def _defined_outside_lightning(thing: object, method: str) -> bool:
    return getattr(type(thing), method).__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")
