"""Language modelling from left to right."""

from typing import Any, NotRequired, TypedDict

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lit_transformer.errors import UsageError
from lit_transformer.metrics import BitsPerByte, Perplexity
from lit_transformer.module import LitTransformer
from lit_transformer.nn import TransformerConfig
from lit_transformer.optim import ParamGroups, Schedule, WarmupCosine


class Batch(TypedDict):
    """What a step reads."""

    input_ids: Tensor
    targets: Tensor
    sample_ids: NotRequired[Tensor]


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
        label_smoothing: Share of the target's probability spread evenly over all V classes, the target's own included,
            as torch defines it: with 0.1 and ten classes the target keeps 0.91 (Szegedy et al. 2016).

    Shapes:
        A batch is a dict with ``input_ids`` and ``targets``, both int64 ``(B, T)``; ``targets`` are the inputs moved on
        by one token.

    Raises:
        ValueError: If ``label_smoothing`` is outside 0 to 1.
        UsageError: At the start of fit, if the data module's blocks are longer than the model's ``max_length``.

    Example:
        >>> task = LitCausalLM(TransformerConfig(vocab_size=10, max_length=8, d_model=16, n_layers=1, n_heads=2))
        >>> ids = torch.zeros(2, 8, dtype=torch.long)
        >>> task.training_loss({"input_ids": ids, "targets": ids}).shape
        torch.Size([])
    """

    def __init__(
        self,
        config: TransformerConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule | None = WarmupCosine(),  # noqa: B008 - frozen
        target_batch_tokens: int | None = None,
        param_groups: ParamGroups = ParamGroups(),  # noqa: B008 - frozen
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(config, optimizer, schedule, target_batch_tokens, param_groups)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.save_hyperparameters({"label_smoothing": label_smoothing})
        self.mean_loss, self.perplexity = MeanMetric(), Perplexity()
        self.accuracy, self.bits_per_byte = MeanMetric(), BitsPerByte()
        self._token_bytes: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Check that the data fits the model."""
        data = getattr(self.trainer, "datamodule", None)
        block_size = getattr(data, "block_size", None)
        if block_size is not None and block_size > self.config.max_length:
            raise UsageError(
                f"the data comes in blocks of {block_size} tokens, but the model takes {self.config.max_length} at "
                f"most; lower data.init_args.block_size or raise model.init_args.config.max_length"
            )
        self._token_bytes = getattr(data, "token_bytes", None)
        super().setup(stage)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits ``(B, T, V)`` of the token after each of ``input_ids`` ``(B, T)``."""
        logits: Tensor = self.model(input_ids)
        return logits

    def training_loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch with label smoothing, in nats per token."""
        logits = self(batch["input_ids"]).float()
        targets = batch["targets"].flatten()
        return F.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=self.label_smoothing)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch, logged."""
        loss = self.training_loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """The mean loss of each sequence in nats per token, ``(B,)``, and the sequences' ids if the batch has any."""
        nats_BT = self._nats(self(batch["input_ids"]), batch["targets"])
        ids = {"sample_ids": batch["sample_ids"]} if "sample_ids" in batch else {}
        return ids | {"loss": nats_BT.mean(dim=1)}

    def _evaluate(self, batch: Batch, stage: str) -> None:
        logits_BTV, targets_BT = self(batch["input_ids"]), batch["targets"]
        nats_BT = self._nats(logits_BTV, targets_BT)
        self.mean_loss.update(nats_BT)
        self.perplexity.update(nats_BT)
        self.accuracy.update((logits_BTV.argmax(-1) == targets_BT).float())
        metrics: dict[str, Any] = {
            f"{stage}/loss": self.mean_loss,
            f"{stage}/perplexity": self.perplexity,
            f"{stage}/accuracy": self.accuracy,
        }
        if self._token_bytes is not None:
            self._token_bytes = self._token_bytes.to(targets_BT.device)
            self.bits_per_byte.update(nats_BT, self._token_bytes[targets_BT])
            metrics[f"{stage}/bits_per_byte"] = self.bits_per_byte
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=stage == "val")

    @staticmethod
    def _nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return F.cross_entropy(logits_BTV.float().transpose(1, 2), targets_BT, reduction="none")
