"""Texts, texts with a class, and pairs of texts, as batches that are padded to their longest."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lit_transformer.data.augmentation.augmenter import Augmenter
from lit_transformer.data.batching.loader import Batch, Samples
from lit_transformer.data.batching.order import Ids
from lit_transformer.data.batching.ragged import Ragged
from lit_transformer.data.batching.token_dropout import drop_tokens
from lit_transformer.objectives import IGNORED


class Texts(Samples):
    """Token ids, padded on the right to the longest of a batch.

    Args:
        name: Of the split.
        tokens: The ids of the texts.
        pad_id: What fills up a batch.
        token_dropout: Share of the tokens to take out.
        seed: Of what is taken out.
        weights: How much each text counts; all alike if None.

    Shapes:
        A batch is ``input_ids`` and ``attention_mask`` of ``(batch, longest)`` and ``sample_ids`` of ``(batch,)``,
        int64; with weights, ``sample_weights`` of ``(batch,)`` as well.
    """

    def __init__(
        self,
        name: str,
        tokens: Ragged,
        pad_id: int,
        token_dropout: float = 0.0,
        seed: int = 0,
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        super().__init__(name)
        self.token_dropout, self.seed = token_dropout, seed
        self.augmenter: Augmenter | None = None  # of the training samples, if there are augmentations
        self.pad_id, self.weights = pad_id, weights
        self.texts = tokens

    def augment(self, batch: Batch, draws: Ids) -> Batch:
        """Change the texts, and take some tokens out."""
        if self.augmenter is not None:
            batch = self.augmenter(batch, draws)
        return drop_tokens(batch, draws, self.token_dropout, self.seed, self.pad_id)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitems__(self, ids: Ids) -> Batch:
        input_ids, attention_mask = self.texts.pad(ids, self.pad_id)
        batch = {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "sample_ids": torch.tensor(ids),
        }
        if self.weights is not None:
            batch["sample_weights"] = torch.from_numpy(self.weights[ids])
        return batch

    def lengths(self) -> Ids:
        """Tokens of each text, ``(n, 1)``."""
        return self.texts.lengths()[:, None]

    def digest(self) -> str:
        """SHA-256 of all that a sample id stands for, without weights."""
        return self.texts.digest()


class LabelledTexts(Texts):
    """Likewise, of a class each.

    Args:
        targets: The classes.

    Shapes:
        A batch has ``targets`` of ``(batch,)``, int64, as well.
    """

    def __init__(
        self,
        name: str,
        tokens: Ragged,
        targets: Sequence[int],
        pad_id: int,
        token_dropout: float = 0.0,
        seed: int = 0,
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        super().__init__(name, tokens, pad_id, token_dropout, seed, weights)
        self.targets = np.array(targets, dtype=np.int64)

    def __getitems__(self, ids: Ids) -> Batch:
        return super().__getitems__(ids) | {"targets": torch.from_numpy(self.targets[ids])}

    def digest(self) -> str:
        """SHA-256 of tokens and classes."""
        return hashlib.sha256(self.texts.digest().encode() + self.targets.tobytes()).hexdigest()


class TextPairs(Texts):
    """Likewise, with a second text each.

    Args:
        sources: The ids of the first texts.
        targets: The ids of the second ones.

    Shapes:
        A batch has ``targets`` of ``(batch, longest target)``, int64, -100 where there is none, as well.
    """

    def __init__(
        self,
        name: str,
        sources: Ragged,
        targets: Ragged,
        pad_id: int,
        token_dropout: float = 0.0,
        seed: int = 0,
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        super().__init__(name, sources, pad_id, token_dropout, seed, weights)
        self.targets = targets

    def __getitems__(self, ids: Ids) -> Batch:
        targets, _ = self.targets.pad(ids, IGNORED)
        return super().__getitems__(ids) | {"targets": torch.from_numpy(targets)}

    def lengths(self) -> Ids:
        """Tokens of each source and target, ``(n, 2)``."""
        return np.stack([self.texts.lengths(), self.targets.lengths()], axis=1)

    def digest(self) -> str:
        """SHA-256 of all tokens."""
        return hashlib.sha256(f"{self.texts.digest()} {self.targets.digest()}".encode()).hexdigest()
