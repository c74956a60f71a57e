"""Is anything learned that the frequencies of the labels do not say already?"""

import math
from collections import Counter, deque
from typing import Any

import torch
from torch import Tensor

_COUNTED = 20  # batches whose labels are counted
_RECENT = 50  # steps whose losses are averaged
_MARGIN = 0.05  # nats
_IGNORED = -100


class LearningProgress:
    """Losses of the last steps, beside the entropy of the labels of the first batches.

    A model that has learned nothing but the frequencies of the labels has a loss of their entropy: a post-LN
    transformer without warm-up stays there for good, and nothing else looks wrong.
    """

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.batches = 0
        self.losses: deque[Tensor] = deque(maxlen=_RECENT)

    def add(self, loss: Tensor, labels: Tensor | None) -> None:
        """One batch; the host reads the labels of the first few only."""
        self.losses.append(loss.detach())
        if labels is not None and self.batches < _COUNTED and not labels.is_floating_point():
            self.batches += 1
            values, counts = labels[labels != _IGNORED].unique(return_counts=True)
            self.counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def recent_loss(self) -> float:
        """The mean of the last losses."""
        return float(torch.stack([loss.float() for loss in self.losses]).mean()) if self.losses else math.nan

    def unigram_entropy(self) -> float:
        """The entropy of the labels, in nats; NaN if there are none.

        Example:
            >>> progress = LearningProgress()
            >>> progress.add(torch.tensor(1.0), torch.tensor([0, 1, -100]))
            >>> round(progress.unigram_entropy(), 4)
            0.6931
        """
        total = self.counts.total()
        return -sum(n / total * math.log(n / total) for n in self.counts.values()) if total else math.nan

    def has_not_begun(self) -> bool:
        """Whether the loss is that of guessing by frequency, or worse. What is no cross-entropy is not judged."""
        loss, entropy = self.recent_loss(), self.unigram_entropy()
        comparable = len(self.counts) > 1 and loss <= 3 * math.log(len(self.counts))
        return comparable and loss >= entropy - _MARGIN

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"counts": dict(self.counts), "batches": self.batches, "losses": [float(loss) for loss in self.losses]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.counts, self.batches = Counter(state["counts"]), state["batches"]
        self.losses = deque((torch.tensor(loss) for loss in state["losses"]), maxlen=_RECENT)
