"""The LightningModule that all tasks with our own transformer share."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from lit_transformer.distillation import Distillation
from lit_transformer.errors import UsageError
from lit_transformer.nn import Transformer, TransformerConfig
from lit_transformer.objectives import Objective
from lit_transformer.optim import ParamGroups, Schedule, WarmupCosine
from lit_transformer.task import LitTask
from lit_transformer.warm_start import load_body


class LitTransformer(LitTask):
    """A transformer with the recipe that trains it; a task adds objective and batches.

    Args:
        config: Shape and choices of the model.
        objective: Loss and metrics.
        optimizer: See :class:`~lit_transformer.recipe.LitRecipe`.
        schedule: Likewise.
        target_batch_tokens: Likewise.
        param_groups: Likewise.
        distillation: See :class:`~lit_transformer.task.LitTask`.
        init_from: A checkpoint of ours to take the weights from, all but those of another head.

    Raises:
        ValueError: If an argument is out of range.
        UsageError: At the start of fit, as :class:`~lit_transformer.recipe.LitRecipe` says; if the data's blocks are
            longer than ``max_length``; if the checkpoint to start from is of another architecture.
    """

    def __init__(
        self,
        config: TransformerConfig,
        objective: Objective,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = WarmupCosine(),  # noqa: B008 - frozen
        target_batch_tokens: int | None = None,
        param_groups: ParamGroups = ParamGroups(),  # noqa: B008 - frozen
        distillation: Distillation | None = None,
        init_from: str | None = None,
    ) -> None:
        super().__init__(objective, optimizer, schedule, target_batch_tokens, param_groups, distillation)
        # A checkpoint hands back what was saved below: plain data.
        self.config = TransformerConfig(**config) if isinstance(config, Mapping) else config
        self.init_from = init_from
        self.save_hyperparameters({"config": asdict(self.config), "init_from": init_from})
        self.model = Transformer(self.config)
        self._has_weights = False

    def setup(self, stage: str) -> None:
        """Check that the data fits the model."""
        block_size = getattr(getattr(self.trainer, "datamodule", None), "block_size", None)
        if block_size is not None and block_size > self.config.max_length:
            raise UsageError(
                f"the data comes in blocks of {block_size} tokens, but the model takes {self.config.max_length} at "
                f"most; lower data.init_args.block_size or raise model.init_args.config.max_length"
            )
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Take the weights to start from, unless a checkpoint has been loaded, or this is a second fit."""
        super().on_fit_start()
        if self.init_from is not None and not self._has_weights:
            load_body(self, self.init_from)
        self._has_weights = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The checkpoint's weights are the ones to go on with."""
        super().on_load_checkpoint(checkpoint)
        self._has_weights = True
