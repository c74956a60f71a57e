"""Classification of sequences."""

from collections.abc import Sequence
from functools import partial

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_transformer.distillation import Distillation
from lit_transformer.module import LitTransformer
from lit_transformer.nn import TransformerConfig
from lit_transformer.nn.classifier import DecoderClassifier, EncoderClassifier, Pooling
from lit_transformer.objectives import ClassObjective
from lit_transformer.optim import ParamGroups, Schedule, WarmupCosine
from lit_transformer.task import Batch


class LitClassifier(LitTransformer):
    """Say what class a sequence is of, or with ``multi_label`` which classes.

    Logs:
        train/loss: mean loss in nats, with label smoothing if there is any.
        val/loss, test/loss: likewise, without label smoothing.
        val/accuracy, test/accuracy: share of samples right; with ``multi_label`` of (sample, class) pairs.
        val/f1, test/f1: mean over the classes.

    Args:
        config: See :class:`~lit_transformer.module.LitTransformer`.
        labels: Names of the classes. Under the command line they come from the data.
        num_labels: Number of classes where they have no names.
        multi_label: Whether a sample may be in any number of classes.
        pooling: ``mean`` of the tokens; ``cls``, the first one; or ``last``, the last one that is no padding.
        causal: Whether a token sees only those before it: the layers of a causal language model, to start from one.
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
        A batch is a dict with ``input_ids`` ``(B, T)``, ``attention_mask`` ``(B, T)`` if there is padding, on the
        right, and ``targets``, int64 ``(B,)``, or with ``multi_label`` 0 and 1 ``(B, C)``.

    Raises:
        ValueError: If an argument is out of range, or neither ``labels`` nor ``num_labels`` is given.
        UsageError: As :class:`~lit_transformer.module.LitTransformer`.

    Example:
        >>> small = TransformerConfig(vocab_size=10, max_length=8, d_model=16, n_layers=1, n_heads=2)
        >>> task = LitClassifier(small, num_labels=3)
        >>> task(torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2, 3])
    """

    kind = "classification"

    def __init__(
        self,
        config: TransformerConfig,
        labels: Sequence[str] | None = None,
        num_labels: int | None = None,
        multi_label: bool = False,
        pooling: Pooling = "mean",
        causal: bool = False,
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
        if labels is None and num_labels is None:
            raise ValueError("give labels, the names of the classes, or num_labels")
        count = len(labels) if labels is not None else num_labels
        if num_labels is not None and count != num_labels:
            raise ValueError(f"labels and num_labels do not agree: {count} names, num_labels={num_labels}")
        assert count is not None
        network = partial(DecoderClassifier if causal else EncoderClassifier, num_labels=count, pooling=pooling)
        objective = ClassObjective(count, multi_label, label_smoothing, z_loss)
        super().__init__(
            config, objective, optimizer, schedule, target_batch_tokens, param_groups, distillation, init_from,
            compile_model, network,
        )  # fmt: skip
        self.labels = None if labels is None else list(labels)
        self.save_hyperparameters(
            {"labels": self.labels, "num_labels": count, "multi_label": multi_label, "pooling": pooling}
            | {"causal": causal}
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, C)``."""
        logits: Tensor = self.model(input_ids, attention_mask)
        return logits

    def logits(self, batch: Batch) -> Tensor:
        """Likewise, of a batch."""
        logits: Tensor = self(batch["input_ids"], batch.get("attention_mask"))
        return logits
