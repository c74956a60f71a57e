"""What is predicted, and how well: loss and metrics over logits and targets.

Shapes: B batch, T length, V vocabulary, C classes.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MultilabelAccuracy, MultilabelF1Score

from lit_transformer.errors import UsageError
from lit_transformer.metrics import BitsPerByte, Perplexity

IGNORED = -100
"""The target of a position that does not count, as torch and Hugging Face have it."""

_TINY = 1e-9  # a sum of weights that is 0 divides nothing


class Objective(nn.Module, ABC):
    """A loss for training, and metrics for evaluation.

    Attributes:
        units: What a person reads after the value of a metric.

    Args:
        label_smoothing: Share of the target's probability spread evenly over all classes, the target's own included,
            as torch defines it: with 0.1 and ten classes the target keeps 0.91 (Szegedy et al. 2016).
        z_loss: Weight of the squared log of softmax's denominator, which keeps logits from drifting; PaLM has 1e-4
            (Chowdhery et al. 2022). 0 leaves it out.

    Raises:
        ValueError: If an argument is out of range.
    """

    units: ClassVar[dict[str, str]]

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        if z_loss < 0:
            raise ValueError(f"z_loss must be at least 0, got {z_loss}")
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.mean_loss = MeanMetric()

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The mean loss in nats, to be minimised; 0, with gradients of 0, if nothing counts.

        Args:
            logits: Of the model.
            targets: What it should say.
            weights: How much each sample counts, ``(B,)``; all alike by default.
        """

    @abstractmethod
    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch to the metrics."""

    @abstractmethod
    def metrics(self) -> dict[str, Metric]:
        """The metrics by name; ``loss`` is without label smoothing."""

    @abstractmethod
    def predictions(self, logits: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """What is said of each sample: tensors of ``(B,)``."""

    @staticmethod
    def counted(logits: Tensor, targets: Tensor) -> Tensor:
        """Which of the logits count, a mask of ``logits.shape[:-1]``."""
        if targets.ndim == logits.ndim:  # several labels a sample
            return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return targets != IGNORED

    def _mean(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """The mean loss of logits ``(N, C)`` by targets ``(N,)`` and weights ``(N,)``, over what counts."""
        logits = logits.float()
        reduction = "sum" if weights is None else "none"
        total = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=self.label_smoothing)
        if weights is None and not self.z_loss:
            return total / (targets != IGNORED).sum().clamp(min=1)
        counted = (targets != IGNORED).float() if weights is None else (targets != IGNORED) * weights
        if weights is not None:
            total = (total * weights).sum()
        if self.z_loss:
            total = total + self.z_loss * (logits.logsumexp(-1).square() * counted).sum()
        return total / counted.sum().clamp(min=_TINY)


class TokenObjective(Objective):
    """Predict tokens; positions whose target is -100 do not count.

    Metrics: loss in nats per token, perplexity (exp of that), accuracy (share of tokens predicted right), and, where
    ``token_bytes`` is set to the number of bytes each token id stands for, bits per byte.

    Shapes:
        Logits ``(B, T, V)``, targets ``(B, T)``.

    Example:
        >>> objective = TokenObjective()
        >>> float(objective.loss(torch.zeros(1, 3, 4), torch.tensor([[0, 1, -100]])))  # log 4
        1.3862943649291992
    """

    units: ClassVar = {
        "loss": "nats per token",
        "bits_per_byte": "bits per byte",
        "accuracy": "of tokens predicted right",
    }
    token_bytes: Tensor | None = None

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        super().__init__(label_smoothing, z_loss)
        self.perplexity, self.accuracy, self.bits_per_byte = Perplexity(), MeanMetric(), BitsPerByte()

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over the tokens that count."""
        if weights is not None:
            weights = weights[:, None].expand_as(targets).flatten()
        return self._mean(logits.flatten(0, -2), targets.flatten(), weights)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add the tokens that count."""
        nats, counted = self._nats(logits, targets), targets != IGNORED
        self.mean_loss.update(nats, counted)
        self.perplexity.update(nats, counted)
        self.accuracy.update((logits.argmax(-1) == targets).float(), counted)
        if self.token_bytes is not None:
            self.token_bytes = self.token_bytes.to(targets.device)
            self.bits_per_byte.update(nats, self.token_bytes[targets.where(counted, 0)] * counted)

    def metrics(self) -> dict[str, Metric]:
        """Loss, perplexity, accuracy, and bits per byte where they are known."""
        found: dict[str, Metric] = {"loss": self.mean_loss, "perplexity": self.perplexity, "accuracy": self.accuracy}
        return found if self.token_bytes is None else found | {"bits_per_byte": self.bits_per_byte}

    def predictions(self, logits: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """The mean loss of each sequence in nats per token."""
        if targets is None:
            raise UsageError("a prediction about tokens is how likely the targets are, and the batch has no targets")
        count = (targets != IGNORED).sum(1).clamp(min=1)
        return {"loss": self._nats(logits, targets).sum(1) / count}

    @staticmethod
    def _nats(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


class ClassObjective(Objective):
    """Predict the class of a sample, or with ``multi_label`` which of the classes it is in.

    Metrics: loss in nats (with ``multi_label``, per class), accuracy, and F1 as the mean over the classes, in which a
    rare class counts as much as a frequent one.

    Args:
        num_labels: Number of classes C.
        multi_label: Whether a sample may be in any number of them.
        label_smoothing: See :class:`Objective`; not with ``multi_label``.

    Shapes:
        Logits ``(B, C)``; targets int64 ``(B,)``, or with ``multi_label`` 0 or 1 ``(B, C)`` of any dtype.

    Raises:
        ValueError: If there are fewer than two classes (one, with ``multi_label``), or an argument is out of range.

    Example:
        >>> float(ClassObjective(2).loss(torch.zeros(3, 2), torch.tensor([0, 1, 1])))  # log 2
        0.6931471824645996
    """

    units: ClassVar = {"loss": "nats", "accuracy": "of samples right", "f1": "F1, as the mean over the classes"}

    def __init__(
        self, num_labels: int, multi_label: bool = False, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> None:
        super().__init__(label_smoothing, z_loss)
        if num_labels < (1 if multi_label else 2):
            raise ValueError(f"num_labels must be at least {1 if multi_label else 2}, got {num_labels}")
        for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
            if multi_label and value:
                raise ValueError(f"{name}={value} and multi_label do not go together; set it to 0")
        self.multi_label = multi_label
        if multi_label:
            self.accuracy: Metric = MultilabelAccuracy(num_labels, average="micro")
            self.f1: Metric = MultilabelF1Score(num_labels)
        else:
            self.accuracy, self.f1 = MulticlassAccuracy(num_labels, average="micro"), MulticlassF1Score(num_labels)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over the samples, and with ``multi_label`` over the classes."""
        if not self.multi_label:
            return self._mean(logits, targets, weights)
        nats = self._nats(logits, targets)
        return nats.mean() if weights is None else (nats * weights).sum() / weights.sum().clamp(min=_TINY)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add the samples that have a class."""
        counted = self.counted(logits, targets)
        logits, targets = logits[counted], targets[counted]
        if not len(targets):
            return
        self.mean_loss.update(self._nats(logits, targets))
        guessed = logits.float().sigmoid() if self.multi_label else logits.argmax(-1)
        self.accuracy.update(guessed, targets.long())
        self.f1.update(guessed, targets.long())

    def metrics(self) -> dict[str, Metric]:
        """Loss, accuracy and F1."""
        return {"loss": self.mean_loss, "accuracy": self.accuracy, "f1": self.f1}

    def predictions(self, logits: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """The class and its probability, or with ``multi_label`` the probability of each; the loss, with targets."""
        if self.multi_label:
            found = {f"probability_{i}": p for i, p in enumerate(logits.float().sigmoid().unbind(-1))}
        else:
            probability, label = logits.float().softmax(-1).max(-1)
            found = {"label": label, "probability": probability}
        return found if targets is None else found | {"loss": self._nats(logits, targets)}

    def _nats(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.multi_label:
            return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(-1)
        return F.cross_entropy(logits.float(), targets, reduction="none")
