"""The LightningModule that all tasks share: model, optimizer, schedule."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning_utilities.core.rank_zero import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_transformer.batch_geometry import BatchGeometry, measure
from lit_transformer.errors import UsageError
from lit_transformer.nn import Transformer, TransformerConfig
from lit_transformer.optim import Schedule, WarmupCosine, decay_groups
from lit_transformer.optim.spec import factory_spec, instance_spec, load_factory
from lit_transformer.optim.total_steps import total_steps


class LitTransformer(LightningModule):
    """A transformer with the recipe that trains it; a task adds loss, metrics and batches.

    Hyperparameters are saved as plain data, so ``load_from_checkpoint`` works with ``weights_only=True``.

    Args:
        config: Shape and choices of the model.
        optimizer: Class of the optimizer, or a ``functools.partial`` of it. Biases, norms and embeddings get no weight
            decay. Torch's fused kernels are used where they exist.
        schedule: What the learning rate is multiplied by at each step; None keeps it constant.
        target_batch_tokens: Tokens an optimizer step should see, over all devices. Accumulation is derived from it,
            rounded up, at the start of each fit; leave ``accumulate_grad_batches`` of the Trainer at 1. Needs a data
            module with ``tokens_per_batch``.

    State:
        The batch geometry of the last fit, so that a resumed run says when it changes.

    Raises:
        ValueError: If ``optimizer`` is not a class or a partial of one.
        UsageError: At the start of fit, if the length of the run is unknown, or if ``target_batch_tokens`` and
            ``accumulate_grad_batches`` are both given.
    """

    def __init__(
        self,
        config: TransformerConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = WarmupCosine(),  # noqa: B008 - frozen
        target_batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if target_batch_tokens is not None and target_batch_tokens < 1:
            raise ValueError(f"target_batch_tokens must be at least 1, got {target_batch_tokens}")
        # A checkpoint hands back what was saved below: plain data.
        self.config = TransformerConfig(**config) if isinstance(config, Mapping) else config
        self.optimizer_factory: Callable[..., Optimizer] = (
            load_factory(optimizer) if isinstance(optimizer, Mapping) else optimizer
        )
        self.schedule: Schedule | None = load_factory(schedule)() if isinstance(schedule, Mapping) else schedule
        self.target_batch_tokens = target_batch_tokens
        self.save_hyperparameters(
            {
                "config": asdict(self.config),
                "optimizer": factory_spec(self.optimizer_factory),
                "schedule": None if self.schedule is None else instance_spec(self.schedule),
                "target_batch_tokens": target_batch_tokens,
            }
        )
        self.model = Transformer(self.config)
        self._geometry: BatchGeometry | None = None
        self._groups: list[dict[str, Any]] = []

    def setup(self, stage: str) -> None:
        """Derive accumulation from ``target_batch_tokens`` before anything counts steps."""
        if stage == "fit" and self.target_batch_tokens is not None:
            geometry = measure(self.trainer, self.target_batch_tokens)
            self.trainer.accumulate_grad_batches = geometry.accumulation
            self._geometry = geometry

    def configure_optimizers(self) -> Any:
        """Decay and no-decay groups; the schedule steps with the optimizer and is logged as ``lr/<group>``."""
        optimizer = self.optimizer_factory(decay_groups(self))
        if isinstance(optimizer, torch.optim.SGD | torch.optim.Adam):
            # Set on the groups, not in the constructor: a constructor's fused=True makes the optimizer unscale by
            # itself, and then clipping under a GradScaler raises. Fused is the fastest on CPU as well.
            for group in optimizer.param_groups:
                if group["fused"] is None and group["foreach"] is None:
                    group["fused"] = True
        factor = partial(self._factor, total_steps=total_steps(self.trainer))
        try:
            factor(0)  # a warm-up that does not fit into the run is refused here, before the first step
        except ValueError as error:
            raise UsageError(str(error)) from None
        scheduler = LambdaLR(optimizer, factor)
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def _factor(self, step: int, total_steps: int) -> float:
        return 1.0 if self.schedule is None else self.schedule.factor(step, total_steps)

    def on_train_start(self) -> None:
        """After a resume, the learning rate follows this run's settings again, not those in the checkpoint.

        Torch restores ``lr``, ``weight_decay`` and the like from the checkpoint's optimizer state, over the
        configuration and without a word.
        """
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
        if self._geometry is not None:
            rank_zero_info(self._geometry.describe())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the batch geometry with the weights."""
        if self._geometry is not None:
            checkpoint["batch_geometry"] = asdict(self._geometry)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say when the number of devices, and with it the batch, is not what it was."""
        earlier = checkpoint.get("batch_geometry")
        if earlier is not None and self._geometry is not None and earlier != asdict(self._geometry):
            rank_zero_info(f"Before this resume: {BatchGeometry(**earlier).describe()}")
