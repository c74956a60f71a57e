"""What a model has to be better than: predictions that look at almost nothing."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_transformer.data.batching.order import Ids
from lit_transformer.data.batching.ragged import Ragged


@dataclass(frozen=True)
class Baseline:
    """A score without learning.

    Args:
        metric: What it is to be compared with, without ``val/``.
        name: What predicts.
        value: Its score on the validation data.
    """

    metric: str
    name: str
    value: float


def unigram_loss(train_counts: NDArray[np.int64], counts: NDArray[np.int64]) -> float:
    """Nats per token of guessing tokens by their frequency in training, each seen once more than it was.

    Example:
        >>> round(unigram_loss(np.array([8, 0]), np.array([1, 1])), 4)  # of 0.9 and 0.1
        1.204
    """
    probability = (train_counts + 1) / (train_counts + 1).sum()
    return float(-(counts * np.log(probability)).sum() / counts.sum())


def bag_of_words(train: Ragged, train_classes: Ids, texts: Ragged, vocab_size: int) -> Ids:
    """The class of each text by how often each token is in it: multinomial naive Bayes, each count one more.

    Example:
        >>> train, other = Ragged([[0, 0, 1], [2, 2]]), Ragged([[2, 1, 2], [0]])
        >>> bag_of_words(train, np.array([0, 1]), other, vocab_size=3).tolist()
        [1, 0]
    """
    classes = int(train_classes.max()) + 1
    counts = np.ones((classes, vocab_size))
    for label in range(classes):
        counts[label] += train.counts(vocab_size, np.flatnonzero(train_classes == label))
    word = np.log(counts / counts.sum(1, keepdims=True))
    prior = np.log(np.bincount(train_classes, minlength=classes) / len(train_classes))
    return np.array([(word @ texts.counts(vocab_size, np.array([i])) + prior).argmax() for i in range(len(texts))])
