"""Sequence to sequence: a text from a text."""

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torchmetrics.text import CHRFScore, SacreBLEUScore

from lit_transformer.distillation import Distillation
from lit_transformer.errors import UsageError
from lit_transformer.module import LitTransformer
from lit_transformer.nn import EncoderDecoder, TransformerConfig
from lit_transformer.nn.beam_search import beam_search
from lit_transformer.objectives import IGNORED, TokenObjective
from lit_transformer.optim import ParamGroups, Schedule, WarmupCosine
from lit_transformer.strategies.sharded import keep_whole, shards
from lit_transformer.task import Batch


class LitSeq2Seq(LitTransformer):
    """Write the target of each source, with an encoder and a decoder (Vaswani et al. 2017).

    In training the decoder is shown the target so far (teacher forcing). In evaluation it also writes by itself, by
    beam search, for some of the samples; BLEU (Papineni et al. 2002, as sacreBLEU does it) and chrF++ (Popović 2017)
    compare that with the targets.

    Logs:
        train/loss: mean loss per token in nats, with label smoothing if there is any.
        val/loss, test/loss: likewise, without label smoothing.
        val/perplexity, test/perplexity: exp of that.
        val/accuracy, test/accuracy: share of tokens right, given the target so far.
        val/bleu, test/bleu, val/chrf, test/chrf: of what is written, from 0 to 1, if ``scored_samples`` is above 0.

    Args:
        config: See :class:`~lit_transformer.module.LitTransformer`.
        eos_id: The token that ends a target, and with which the decoder begins. Under the command line it comes from
            the data.
        scored_samples: How many samples of an evaluation are written, on each device.
        beams: See :func:`~lit_transformer.nn.beam_search.beam_search`; 1 is greedy.
        length_penalty: Likewise.
        max_new_tokens: Likewise; by default the model's ``max_length``.
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
        A batch is a dict with ``input_ids`` ``(B, S)``, ``attention_mask`` ``(B, S)`` if there is padding, and
        ``targets`` ``(B, T)``, int64, each ended by ``eos_id``, then -100.

    Raises:
        ValueError: If an argument is out of range.
        UsageError: As :class:`~lit_transformer.module.LitTransformer`.

    Cost: a validation writes ``scored_samples`` texts, a pass of the decoder for each token of the longest one; under
    FSDP2 each device has the whole model for as long as it lasts.

    Example:
        >>> task = LitSeq2Seq(TransformerConfig(vocab_size=10, max_length=8, d_model=16, n_layers=1, n_heads=2))
        >>> ids = torch.zeros(2, 8, dtype=torch.long)
        >>> task.training_loss({"input_ids": ids, "targets": ids[:, :5]}).shape
        torch.Size([])
    """

    kind = "seq2seq"

    def __init__(
        self,
        config: TransformerConfig,
        eos_id: int | None = 0,
        scored_samples: int = 64,
        beams: int = 1,
        length_penalty: float = 1.0,
        max_new_tokens: int | None = None,
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
        for name, value, least in (("scored_samples", scored_samples, 0), ("beams", beams, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        objective = TokenObjective(label_smoothing, z_loss)
        super().__init__(
            config, objective, optimizer, schedule, target_batch_tokens, param_groups, distillation, init_from,
            compile_model, EncoderDecoder,
        )  # fmt: skip
        longest = self.config.max_length
        if max_new_tokens is not None and not 1 <= max_new_tokens <= longest:
            raise ValueError(f"max_new_tokens must be from 1 to max_length={longest}, got {max_new_tokens}")
        self.eos_id = 0 if eos_id is None else eos_id
        self.scored_samples, self.beams, self.length_penalty = scored_samples, beams, length_penalty
        self.max_new_tokens = longest if max_new_tokens is None else max_new_tokens
        said = {"eos_id": self.eos_id, "scored_samples": scored_samples, "beams": beams}
        self.save_hyperparameters(said | {"length_penalty": length_penalty, "max_new_tokens": max_new_tokens})
        self.bleu, self.chrf = SacreBLEUScore(), CHRFScore()
        self._left = scored_samples

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits ``(B, T, V)`` of the token after each of ``decoder_input_ids`` ``(B, T)``."""
        logits: Tensor = self.model(input_ids, decoder_input_ids, attention_mask)
        return logits

    def logits(self, batch: Batch) -> Tensor:
        """Likewise, of a batch, given the targets so far."""
        targets = self.targets(batch)
        shown = torch.nn.functional.pad(targets[:, :-1], (1, 0), value=self.eos_id)
        logits: Tensor = self(
            batch["input_ids"], shown.where(shown != IGNORED, self.eos_id), batch.get("attention_mask")
        )
        return logits

    def setup(self, stage: str) -> None:
        """Refuse to write alone where no device has the whole model."""
        super().setup(stage)
        in_pieces = shards(self.trainer.strategy) and not isinstance(self.trainer.strategy, ModelParallelStrategy)
        if self.scored_samples and in_pieces:
            raise UsageError(
                f"texts cannot be written under {type(self.trainer.strategy).__name__}: set scored_samples to 0"
            )
        if stage == "predict" and shards(self.trainer.strategy):
            raise UsageError(
                f"texts are not predicted under {type(self.trainer.strategy).__name__}: predict on one device from a "
                "consolidated checkpoint"
            )

    def write(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[list[int]]:
        """The ids of the text for each source, without :attr:`eos_id`; in eval mode."""
        texts = beam_search(
            self.model, input_ids, None if attention_mask is None else attention_mask.bool(), bos_id=self.eos_id,
            eos_id=self.eos_id, max_new_tokens=self.max_new_tokens, beams=self.beams,
            length_penalty=self.length_penalty,
        )  # fmt: skip
        return [text[:-1] if text[-1:] == [self.eos_id] else text for text in texts]

    def on_validation_epoch_start(self) -> None:
        """Count the samples to be written anew; have the whole model for it, as texts end at other times elsewhere."""
        self._left = self.scored_samples
        if self.scored_samples:
            keep_whole(self.model, True)

    def on_validation_epoch_end(self) -> None:
        """Give it up again."""
        keep_whole(self.model, False)

    def on_test_epoch_start(self) -> None:
        """Likewise."""
        self.on_validation_epoch_start()

    def on_test_epoch_end(self) -> None:
        """Likewise."""
        self.on_validation_epoch_end()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The text for each source; with targets, their loss in nats per token as well."""
        found: dict[str, Any] = super().predict_step(batch, batch_idx) if "targets" in batch else {}
        if "sample_ids" in batch:
            found["sample_ids"] = batch["sample_ids"]
        found["text"] = [self._text(ids) for ids in self.write(batch["input_ids"], batch.get("attention_mask"))]
        return found

    def _evaluate(self, batch: Batch, stage: str) -> None:
        super()._evaluate(batch, stage)
        if not self.scored_samples:
            return
        n = min(self._left, len(batch["input_ids"]))
        if n:
            self._left -= n
            mask = batch.get("attention_mask")
            texts = [self._text(ids) for ids in self.write(batch["input_ids"][:n], None if mask is None else mask[:n])]
            wanted = [row[(row != IGNORED) & (row != self.eos_id)].tolist() for row in self.targets(batch)[:n]]
            for metric in (self.bleu, self.chrf):
                metric.update(texts, [[self._text(ids)] for ids in wanted])
        scores = {f"{stage}/bleu": self.bleu, f"{stage}/chrf": self.chrf}
        self.log_dict(scores, on_step=False, on_epoch=True, batch_size=len(batch["input_ids"]))

    def _text(self, ids: list[int]) -> str:
        """What the data says some ids are; without data, the ids."""
        decode = getattr(getattr(self.trainer, "datamodule", None), "decode", None)
        return decode(ids) if decode is not None else " ".join(map(str, ids))
