"""Is the model better than one without attention, that learns from the very same batches?

Shapes: B batch, T length, D width, C classes or tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F

from lit_callbacks.recipe import Finding
from lit_transformer.commands.prepared import PreparedCLI
from lit_transformer.errors import UsageError
from lit_transformer.objectives import IGNORED

_LR = 1e-2  # of 1e-3 to 3e-2 the best for tokens and classes, over 30 steps of default.yaml and over 300
_VALIDATION_BATCHES = 20


def compare(words: list[str], steps: int, options: Callable[[LightningArgumentParser], None]) -> Iterator[Finding]:
    """Train the recipe's model for so many steps, the baseline beside it, and find out if the model is the worse one.

    Both learn from the same batches, and are asked about the same ones of the validation data. The schedule is that of
    a run of so many steps.

    Args:
        words: Of the command.
        steps: Optimizer steps.
        options: Adds the command's own options to a parser.

    Raises:
        UsageError: For what ``fit`` would refuse, and for batches that the baseline cannot read.
    """
    baseline = Baseline(steps)
    short = f"--trainer.max_steps {steps} --trainer.max_epochs -1 --trainer.limit_val_batches 0"
    _Compared([*words, *short.split(), "--trainer.enable_progress_bar", "false"], options, baseline).start()
    theirs, ours = baseline.loss, baseline.model_loss
    print(f"{steps} steps: fully connected baseline {theirs:.3f}, this model {ours:.3f} (validation loss, nats).")
    if not ours < theirs:
        text = f"After {steps} steps the validation loss is {ours:.3f}, and {theirs:.3f} without attention."
        fix = (
            "Give it more steps; else look at learning rate, positions and masks, or attention has nothing to do here."
        )
        yield Finding("worse-than-baseline", "warning", text, fix)


class _Compared(PreparedCLI):
    def after_fit(self) -> None:
        """Validate once; a fit would not always do it after its last step."""
        self.trainer.limit_val_batches = _VALIDATION_BATCHES
        self.trainer.validate(self.model, self.datamodule, verbose=False)


class FullyConnected(nn.Module):
    """Token embedding and one hidden layer: no token sees another, unless they are averaged.

    Args:
        vocabulary: Number of token ids.
        classes: Number of outputs C.
        pooled: One output per sample, from the mean of its tokens, in place of one per token.

    Shapes:
        Token ids and mask ``(B, T)`` to logits ``(B, T, C)``, or pooled ``(B, C)``.

    Example:
        >>> ids = torch.zeros(2, 3, dtype=torch.long)
        >>> FullyConnected(5, 4, pooled=True)(ids, torch.ones(2, 3)).shape
        torch.Size([2, 4])
    """

    def __init__(self, vocabulary: int, classes: int, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.embedding = nn.Embedding(vocabulary, 128)
        self.hidden, self.head = nn.Linear(128, 256), nn.Linear(256, classes)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Logits."""
        x = self.embedding(ids_BT)
        if self.pooled:
            mask_BT1 = mask_BT.unsqueeze(-1).to(x)
            x = (x * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        logits: Tensor = self.head(F.gelu(self.hidden(x)))
        return logits


class Baseline(Callback):
    """Train a fully connected model on what the module is trained on, and validate both. Changes nothing of the run.

    Adam, whose learning rate falls linearly to 0; fp32; a step whenever the module has one.

    Args:
        steps: Length of the run.

    Attributes:
        loss: Mean validation loss of the baseline in nats, of the last validation.
        model_loss: That of the module: its ``val/loss``.

    Raises:
        UsageError: If a batch is not of the kinds it knows, or the module logs no ``val/loss``.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.net: FullyConnected | None = None
        self.model_loss = 0.0
        self._optimizer: Any = None
        self._step = 0
        self._nats, self._count = 0.0, 0

    @property
    def loss(self) -> float:
        """See above."""
        return self._nats / max(1, self._count)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Learn from the batch, and step if the module has."""
        nats, count = self._sum(trainer, pl_module, batch)
        (nats / count.clamp(min=1)).backward()
        if trainer.global_step > self._step:
            for group in self._optimizer.param_groups:
                group["lr"] = _LR * (1 - self._step / self.steps)
            self._step = trainer.global_step
            self._optimizer.step()
            self._optimizer.zero_grad()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._nats, self._count = 0.0, 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Add the batch."""
        nats, count = self._sum(trainer, pl_module, batch)
        self._nats, self._count = self._nats + float(nats), self._count + int(count)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the module has."""
        if "val/loss" not in trainer.callback_metrics:
            raise UsageError(f"the baseline is compared by val/loss, which {type(pl_module).__name__} does not log")
        self.model_loss = float(trainer.callback_metrics["val/loss"])

    def _sum(self, trainer: Trainer, module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss of all targets that count, and their number."""
        ids_BT, mask_BT, targets = read(batch)
        if self.net is None:
            data = getattr(trainer, "datamodule", None)
            vocabulary = getattr(data, "vocab_size", None) or _rows(module)
            labels = getattr(data, "labels", None) if targets.dim() == 1 else None
            with isolate_rng():  # the module's run is the one that fit would make
                self.net = FullyConnected(vocabulary, len(labels or range(vocabulary)), targets.dim() == 1)
            self.net.to(module.device)
            self._optimizer = torch.optim.Adam(self.net.parameters(), lr=_LR)
        logits = self.net(ids_BT, mask_BT)
        nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return nats, (targets != IGNORED).sum()


def read(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids ``(B, T)``, which of them are no padding, and targets ``(B, T)`` or ``(B,)``.

    Raises:
        UsageError: If the batch has no such things.
    """
    found = batch if isinstance(batch, Mapping) else {}
    ids_BT, targets = found.get("input_ids"), found.get("targets", found.get("labels"))
    if ids_BT is not None and targets is not None and "decoder_input_ids" not in found:
        per_token = targets.shape == ids_BT.shape and "targets" in found  # labels are moved by one inside of a model
        if not targets.is_floating_point() and (per_token or targets.shape == ids_BT.shape[:1]):
            return ids_BT, found.get("attention_mask", torch.ones_like(ids_BT)), targets
    shapes = [f"{name} {tuple(value.shape)}" for name, value in found.items() if isinstance(value, Tensor)]
    raise UsageError(
        "the baseline knows batches of input_ids (B, T) with integer targets of (B, T) or (B,), or labels of (B,), got "
        f"{', '.join(shapes) or type(batch).__name__}; leave out --baseline_steps"
    )


def _rows(module: LightningModule) -> int:
    return max((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), default=1)
