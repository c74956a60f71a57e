"""Metrics of a language model, exact over batches of different size and over ranks."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric


class Perplexity(MeanMetric):
    """``exp`` of the mean loss per token; update with the loss per token in nats, and its weight.

    torchmetrics' own ``Perplexity`` computes a softmax over the vocabulary a second time.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor([0.0, math.log(4)]))
        >>> metric.compute()
        tensor(2.)
    """

    def compute(self) -> Tensor:
        """``exp`` of the weighted mean."""
        return super().compute().exp()


class BitsPerByte(Metric):
    """Bits needed per byte of text: comparable between tokenizers, where the loss per token is not.

    Update with the loss of each token in nats and with the number of bytes each token stands for.

    Example:
        >>> metric = BitsPerByte()
        >>> metric.update(torch.tensor([math.log(2), math.log(8)]), torch.tensor([1, 3]))
        >>> metric.compute()
        tensor(1.)
    """

    full_state_update = False
    nats: Tensor
    bytes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nats", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("bytes", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, n_bytes: Tensor) -> None:
        """Add tokens: their loss in nats, and their length in bytes, both of any shape."""
        self.nats += nats.sum()
        self.bytes += n_bytes.sum()

    def compute(self) -> Tensor:
        """Bits per byte so far."""
        return self.nats / math.log(2) / self.bytes
