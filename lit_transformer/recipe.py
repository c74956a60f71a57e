"""How any model is trained: optimizer, parameter groups, schedule, accumulation."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_transformer.batch_geometry import BatchGeometry, measure
from lit_transformer.errors import UsageError
from lit_transformer.optim import ParamGroups, Plateau, Schedule, WarmupConstant, WarmupCosine, WarmupPlateau
from lit_transformer.optim.schedule_free import AveragedWeights, go_on, is_schedule_free
from lit_transformer.optim.spec import factory_spec, factory_target, instance_spec, load_factory
from lit_transformer.optim.total_steps import total_steps
from lit_transformer.strategies.sharded import clip_by_norm, give_up_whole, saves_averages, whole_dims
from lit_transformer.strategies.zero import prepare, settle_accumulation


class LitRecipe(LightningModule):
    """The part of a LightningModule that decides how parameters move; a subclass brings the model and its loss.

    Hyperparameters are saved as plain data, so ``load_from_checkpoint`` works with ``weights_only=True``.

    Args:
        optimizer: Class of the optimizer, or a ``functools.partial`` of it. Adam and AdamW run fused. To
            schedule-free ones belongs ``WarmupConstant``: their average takes the place of decay.
        schedule: What the learning rate is multiplied by at each step; None keeps it constant.
        target_batch_tokens: Tokens an optimizer step should see, over all devices. Accumulation is derived from it,
            rounded up, at the start of each fit; leave ``accumulate_grad_batches`` of the Trainer at 1. Needs a data
            module with ``tokens_per_batch``.
        param_groups: Decay, learning rates and freezing by parameter.

    State:
        The batch geometry of the last fit, so that a resumed run says when it changes; what a plateau schedule has
        seen. With a schedule-free optimizer, a checkpoint's weights are the average, which is also what is validated
        and what a fit ends with; those that are trained stand beside it.

    Raises:
        ValueError: If ``optimizer`` is not a class or a partial of one.
        UsageError: At the start of fit, if the length of the run is unknown, if ``target_batch_tokens`` and
            ``accumulate_grad_batches`` are both given, if a pattern matches no parameter, nothing is trainable, or the
            optimizer refuses a value.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = WarmupCosine(),  # noqa: B008 - frozen
        target_batch_tokens: int | None = None,
        param_groups: ParamGroups = ParamGroups(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        if target_batch_tokens is not None and target_batch_tokens < 1:
            raise ValueError(f"target_batch_tokens must be at least 1, got {target_batch_tokens}")
        # A checkpoint hands back what was saved below: plain data.
        self.optimizer_factory: Callable[..., Optimizer] = (
            load_factory(optimizer) if isinstance(optimizer, Mapping) else optimizer
        )
        self.schedule: Schedule | None = load_factory(schedule)() if isinstance(schedule, Mapping) else schedule
        self.param_groups = ParamGroups(**param_groups) if isinstance(param_groups, Mapping) else param_groups
        self.target_batch_tokens = target_batch_tokens
        self.save_hyperparameters(
            {
                "optimizer": factory_spec(self.optimizer_factory),
                "schedule": None if self.schedule is None else instance_spec(self.schedule),
                "target_batch_tokens": target_batch_tokens,
                "param_groups": asdict(self.param_groups),
            }
        )
        self._geometry: BatchGeometry | None = None
        self._groups: list[dict[str, Any]] = []
        self._lr_scale = 1.0
        self._plateau: Plateau | None = None
        self._plateau_state: dict[str, Any] | None = None
        self._validated = False
        self._averaged: AveragedWeights | None = None

    @property
    def learning_rate(self) -> float:
        """The full learning rate, of the schedule's peak. Setting it scales all parameter groups alike.

        It is where Lightning's ``LearningRateFinder`` writes its suggestion.
        """
        return self._base_lr() * self._lr_scale

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        scale = value / self._base_lr()
        for group in self._groups:
            group["initial_lr"] *= scale / self._lr_scale
        self._lr_scale = scale

    def _base_lr(self) -> float:
        optimizer = self.optimizer_factory([torch.nn.Parameter(torch.zeros(1, 1))])
        return float(optimizer.param_groups[0]["lr"])

    def setup(self, stage: str) -> None:
        """Freeze what is to be frozen; derive accumulation before anything counts steps."""
        if stage != "fit":
            return
        self.param_groups.freeze(self)
        if self.target_batch_tokens is not None:
            geometry = measure(self.trainer, self.target_batch_tokens)
            self.trainer.accumulate_grad_batches = geometry.accumulation
            self._geometry = geometry

    def groups_to_train(self) -> list[dict[str, Any]]:
        """What the optimizer is made of: parameters with their settings, by group."""
        apart = bool(getattr(factory_target(self.optimizer_factory), "hidden_apart", False))
        model = self if self._trainer is None else self.trainer.strategy.model or self
        strategy = None if self._trainer is None else self.trainer.strategy
        if apart and isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
            raise UsageError(
                f"{factory_target(self.optimizer_factory).__name__} needs whole matrices, of which "
                f"{type(strategy).__name__} leaves flat pieces: use strategy ddp or fsdp2"
            )
        return self.param_groups.build(self, apart, whole_dims(model))

    def configure_optimizers(self) -> Any:
        """One optimizer; the schedule steps with it and is logged as ``lr/<group>``."""
        prepare(self.trainer.strategy)
        groups = self.groups_to_train()
        try:
            optimizer = self.optimizer_factory(groups)
        except ValueError as error:
            raise UsageError(f"{factory_target(self.optimizer_factory).__name__}: {error}") from None
        self._averaged = AveragedWeights(optimizer) if is_schedule_free(optimizer) else None
        if self._averaged is not None and not saves_averages(self.trainer.strategy):
            raise UsageError(
                f"{type(optimizer).__name__} keeps two sets of weights, which {type(self.trainer.strategy).__name__} "
                "does not save as it is set: use another optimizer, or strategy ddp, or fsdp2 with checkpoints in parts"
            )
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"] * self._lr_scale
        if isinstance(optimizer, torch.optim.Adam):
            # Set on the groups, not in the constructor: a constructor's fused=True makes the optimizer unscale by
            # itself, and then clipping under a GradScaler raises. Fused is the fastest on CPU as well. Not so for SGD:
            # torch's fused one with momentum fails on a parameter whose first gradient comes in a later step.
            for group in optimizer.param_groups:
                if group["fused"] is None and group["foreach"] is None:
                    group["fused"] = True
        self._start_plateau(max(group["lr"] for group in optimizer.param_groups))
        steps = total_steps(self.trainer)
        try:
            self._multiplier(0, steps)  # what does not fit into the run is refused here, before the first step
        except ValueError as error:
            raise UsageError(str(error)) from None
        scheduler = LambdaLR(optimizer, lambda step: self._multiplier(step, steps))
        self._groups = [_settings(optimizer, group) for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm under FSDP1 as well, where Lightning refuses to."""
        value, algorithm = gradient_clip_val, gradient_clip_algorithm or "norm"
        if not (value and algorithm == "norm" and clip_by_norm(self.trainer.strategy.model or self, value)):
            super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _multiplier(self, step: int, total_steps: int) -> float:
        scheduled = 1.0 if self.schedule is None else self.schedule.multiplier(step, total_steps)
        return scheduled if self._plateau is None else scheduled * self._plateau.scale

    # ---- the plateau

    def _start_plateau(self, peak_lr: float) -> None:
        self._plateau = None
        if isinstance(self.schedule, WarmupPlateau):
            self._plateau = self.schedule.start(peak_lr)
            if self._plateau_state is not None:
                self._plateau.load_state_dict(self._plateau_state)

    def on_validation_start(self) -> None:
        """Remember to look at its result, at the next batch: a checkpoint may be saved before the result is there."""
        self._validated = not self.trainer.sanity_checking
        if self._averaged is not None and self.trainer.state.fn == "fit":
            self._averaged.put_in_place()

    def on_validation_end(self) -> None:
        """Back to the weights that are trained."""
        if self._averaged is not None and self.trainer.state.fn == "fit":
            give_up_whole(self)
            self._averaged.take_out()

    def on_train_end(self) -> None:
        """What a schedule-free optimizer ends with is the average."""
        if self._averaged is not None:
            give_up_whole(self)
            self._averaged.put_in_place()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Show the plateau the result of the validation since the last batch."""
        validated, self._validated = self._validated, False
        if self._plateau is None or not validated or self._warming_up():
            return
        monitor, metrics = self._plateau.schedule.monitor, self.trainer.callback_metrics
        if monitor in metrics:
            self._plateau.observe(float(metrics[monitor]))
            self._impose()
        elif self.trainer.fit_loop.epoch_loop.val_loop._has_run:
            logged = ", ".join(sorted(metrics))
            raise UsageError(f"WarmupPlateau(monitor={monitor!r}) found no such metric after a validation: {logged}")

    def _warming_up(self) -> bool:
        assert isinstance(self.schedule, WarmupConstant)
        return self.trainer.global_step < self.schedule.warmup_steps(total_steps(self.trainer))

    # ---- resume

    def on_train_start(self) -> None:
        """After a resume, the learning rate follows this run's settings again, not those in the checkpoint.

        Torch restores ``lr``, ``weight_decay`` and the like from the checkpoint's optimizer state, over the
        configuration and without a word.
        """
        settle_accumulation(self.trainer)
        self._impose()
        if self._averaged is not None:
            self._averaged.go_on()
        if self._geometry is not None:
            rank_zero_info(self._geometry.describe())

    def _impose(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            if not isinstance(scheduler, LambdaLR):
                continue
            scheduler.base_lrs = [group["initial_lr"] for group in self._groups]
            for group, configured, multiplier in zip(
                scheduler.optimizer.param_groups, self._groups, scheduler.lr_lambdas, strict=True
            ):
                group.update(configured, lr=configured["initial_lr"] * multiplier(scheduler.last_epoch))
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the batch geometry, what the plateau has seen, and a schedule-free optimizer's other weights."""
        if self._averaged is not None:
            give_up_whole(self)
            self._averaged.save(self, checkpoint)
        if self._geometry is not None:
            checkpoint["batch_geometry"] = asdict(self._geometry)
        if self._plateau is not None:
            checkpoint["plateau"] = {"state": self._plateau.state_dict(), "validated": self._validated}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say when the number of devices, and with it the batch, is not what it was; go on where training was."""
        if self._trainer is not None and self._trainer.state.fn == "fit":
            go_on(checkpoint)
        earlier = checkpoint.get("batch_geometry")
        if earlier is not None and self._geometry is not None and earlier != asdict(self._geometry):
            rank_zero_info(f"Before this resume: {BatchGeometry(**earlier).describe()}")
        if "plateau" in checkpoint:
            self._plateau_state, self._validated = checkpoint["plateau"]["state"], checkpoint["plateau"]["validated"]


def _settings(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """What a group has from the configuration; what else is in it, the optimizer counts."""
    arguments = {name for cls in type(optimizer).__mro__ for name in inspect.signature(cls).parameters}
    own = (arguments | {"name", "lr_scale", "initial_lr", "muon"}) - {"params"}
    return {key: value for key, value in group.items() if key in own}
