"""The LightningModule that all tasks with our own transformer share."""

from collections.abc import Mapping
from dataclasses import asdict

import torch
from lightning.pytorch.cli import OptimizerCallable

from lit_transformer.nn import Transformer, TransformerConfig
from lit_transformer.optim import ParamGroups, Schedule, WarmupCosine
from lit_transformer.recipe import LitRecipe


class LitTransformer(LitRecipe):
    """A transformer with the recipe that trains it; a task adds loss, metrics and batches.

    Args:
        config: Shape and choices of the model.
        optimizer: See :class:`~lit_transformer.recipe.LitRecipe`.
        schedule: Likewise.
        target_batch_tokens: Likewise.
        param_groups: Likewise.

    Raises:
        ValueError: If an argument is out of range.
        UsageError: At the start of fit, as :class:`~lit_transformer.recipe.LitRecipe` says.
    """

    def __init__(
        self,
        config: TransformerConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = WarmupCosine(),  # noqa: B008 - frozen
        target_batch_tokens: int | None = None,
        param_groups: ParamGroups = ParamGroups(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(optimizer, schedule, target_batch_tokens, param_groups)
        # A checkpoint hands back what was saved below: plain data.
        self.config = TransformerConfig(**config) if isinstance(config, Mapping) else config
        self.save_hyperparameters({"config": asdict(self.config)})
        self.model = Transformer(self.config)
