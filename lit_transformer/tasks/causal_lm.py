"""Language modelling from left to right."""

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_transformer.distillation import Distillation
from lit_transformer.module import LitTransformer
from lit_transformer.nn import TransformerConfig
from lit_transformer.objectives import TokenObjective
from lit_transformer.optim import ParamGroups, Schedule, WarmupCosine
from lit_transformer.task import Batch


class LitCausalLM(LitTransformer):
    """Predict each next token.

    Logs:
        train/loss: mean loss per token in nats, with label smoothing if there is any.
        val/loss, test/loss: mean loss per token in nats, without label smoothing.
        val/perplexity, test/perplexity: exp of that.
        val/accuracy, test/accuracy: share of tokens predicted right.
        val/bits_per_byte, test/bits_per_byte: comparable between tokenizers; absent unless the data module has
            ``token_bytes``, the number of bytes each token id stands for.

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
        A batch is a dict with ``input_ids`` and ``targets``, both int64 ``(B, T)``; ``targets`` are the inputs moved on
        by one token, -100 where none counts. Where several documents share a row, ``document_ids`` ``(B, T)`` has a
        number for each, and none sees another.

    Raises:
        ValueError: If ``label_smoothing`` or ``z_loss`` is out of range.
        UsageError: At the start of fit, if the data module's blocks are longer than the model's ``max_length``.

    Example:
        >>> task = LitCausalLM(TransformerConfig(vocab_size=10, max_length=8, d_model=16, n_layers=1, n_heads=2))
        >>> ids = torch.zeros(2, 8, dtype=torch.long)
        >>> task.training_loss({"input_ids": ids, "targets": ids}).shape
        torch.Size([])
    """

    kind = "causal_lm"

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
            compile_model,
        )  # fmt: skip

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits ``(B, T, V)`` of the token after each of ``input_ids`` ``(B, T)``."""
        logits: Tensor = self.model(input_ids, None, document_ids)
        return logits

    def logits(self, batch: Batch) -> Tensor:
        """Likewise, of a batch."""
        logits: Tensor = self(batch["input_ids"], batch.get("document_ids"))
        return logits
