"""Masked language modelling: hidden tokens are guessed from all others."""

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_transformer.distillation import Distillation
from lit_transformer.module import LitTransformer
from lit_transformer.nn import MaskedTransformer, TransformerConfig
from lit_transformer.objectives import TokenObjective
from lit_transformer.optim import ParamGroups, Schedule, WarmupCosine
from lit_transformer.task import Batch


class LitMaskedLM(LitTransformer):
    """Guess the tokens that are hidden (Devlin et al. 2019); which are is the data's choice.

    Logs:
        train/loss: mean loss per hidden token in nats, with label smoothing if there is any.
        val/loss, test/loss: likewise, without label smoothing.
        val/perplexity, test/perplexity: exp of that.
        val/accuracy, test/accuracy: share of hidden tokens guessed right.

    Args:
        config: See :class:`~lit_transformer.module.LitTransformer`.
        optimizer: Likewise.
        schedule: Likewise.
        target_batch_tokens: Likewise.
        param_groups: Likewise.
        label_smoothing: See :class:`~lit_transformer.objectives.Objective`.
        z_loss: Likewise.
        distillation: See :class:`~lit_transformer.task.LitTask`.
        init_from: See :class:`~lit_transformer.module.LitTransformer`.
        compile_model: Likewise.

    Shapes:
        A batch is a dict with ``input_ids`` and ``targets``, both int64 ``(B, T)``, the latter -100 where nothing was
        hidden; and ``attention_mask`` ``(B, T)`` if there is padding. Where several documents share a row,
        ``document_ids`` ``(B, T)`` has a number for each, and none sees another.

    Raises:
        ValueError: If ``label_smoothing`` or ``z_loss`` is out of range.
        UsageError: As :class:`~lit_transformer.module.LitTransformer`.

    Example:
        >>> task = LitMaskedLM(TransformerConfig(vocab_size=10, max_length=8, d_model=16, n_layers=1, n_heads=2))
        >>> ids = torch.zeros(2, 8, dtype=torch.long)
        >>> task.training_loss({"input_ids": ids, "targets": ids}).shape
        torch.Size([])
    """

    kind = "masked_lm"

    def __init__(
        self,
        config: TransformerConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = WarmupCosine(),  # noqa: B008 - frozen
        target_batch_tokens: int | None = None,
        param_groups: ParamGroups = ParamGroups(),  # noqa: B008 - frozen
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        distillation: Distillation | None = None,
        init_from: str | None = None,
        compile_model: bool = False,
    ) -> None:
        objective = TokenObjective(label_smoothing, z_loss)
        super().__init__(
            config, objective, optimizer, schedule, target_batch_tokens, param_groups, distillation, init_from,
            compile_model, MaskedTransformer,
        )  # fmt: skip

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Tensor:
        """Logits ``(B, T, V)`` of the token at each position."""
        logits: Tensor = self.model(input_ids, attention_mask, document_ids)
        return logits

    def logits(self, batch: Batch) -> Tensor:
        """Likewise, of a batch."""
        logits: Tensor = self(batch["input_ids"], batch.get("attention_mask"), batch.get("document_ids"))
        return logits
