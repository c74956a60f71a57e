"""Texts that are others each time they are trained on."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from lit_transformer.data.augmentation.specs import from_spec, name_of, to_spec
from lit_transformer.data.batching.loader import Batch
from lit_transformer.data.batching.order import Ids
from lit_transformer.data.batching.ragged import Ragged
from lit_transformer.data.encoder import Encoder
from lit_transformer.errors import UsageError
from lit_transformer.optim.spec import Spec


class Augmentation(Protocol):
    """Something to call that makes another text of a text: a function, or an instance of a class of your own.

    It draws its random numbers from ``generator`` alone, so that a resumed run gets the same texts. It is called in the
    process that trains, once for each sample of a batch; for what takes long see :class:`PreparedAugmentation`. In a
    configuration it is the path of a function, or ``class_path`` and ``init_args``, with the parameters annotated as
    here.

    Example:
        >>> def shout(text: str, generator: np.random.Generator) -> str:
        ...     return text.upper() if generator.random() < 0.3 else text
    """

    def __call__(self, text: str, generator: np.random.Generator) -> str:
        """The text to train on; the same one, if nothing is to be changed."""


@runtime_checkable
class PreparedAugmentation(Augmentation, Protocol):
    """One that is shown all training texts before training, for what takes too long in it, such as a language model."""

    def prepare(self, texts: Sequence[str]) -> Sequence[str]:
        """Get ready for these texts, and return the texts that will be made of them.

        To be called on every rank alike; a second time with the same texts it has nothing to do.
        """


class Augmenter:
    """Augmentations, one after the other, of the texts in a batch.

    What a text becomes is a function of ``seed`` and of the draw. It is tokenised anew, and cut off like the others.

    Args:
        augmentations: What to call.
        texts: The training texts, by sample id.
        encoder: Texts to token ids.
        seed: Of the random numbers.

    Cost: some 25 microseconds a sample, and 50 more for one that changes, beside what the augmentations take; the texts
    stay in memory. Loader workers get none of it.
    """

    def __init__(
        self, augmentations: Sequence[Augmentation], texts: Sequence[str], encoder: Encoder, seed: int
    ) -> None:
        self.augmentations, self.texts, self.encoder, self.seed = augmentations, texts, encoder, seed

    def prepare(self, stage: str | None) -> None:
        """Have the augmentations look at the texts, unless nothing is trained in a stage."""
        if stage not in ("fit", None):
            return
        texts = self.texts
        for augmentation in self.augmentations:
            if isinstance(augmentation, PreparedAugmentation):
                texts = [*texts, *augmentation.prepare(texts)]

    def __call__(self, batch: Batch, draws: Ids) -> Batch:
        """The batch with other texts in it.

        Raises:
            UsageError: If an augmentation fails, or returns no text.
        """
        changed = {}
        for row, (sample, draw) in enumerate(zip(batch["sample_ids"].tolist(), draws.tolist(), strict=True)):
            text = self._augmented(sample, draw)
            if text != self.texts[sample]:
                changed[row] = text
        if not changed:
            return batch
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = [ids[:length] for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        for row, ids in zip(changed, self.encoder(list(changed.values()))[0], strict=True):
            rows[row] = ids
        input_ids, mask = Ragged(rows).pad(np.arange(len(rows)), self.encoder.pad_id)
        return batch | {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}

    def _augmented(self, sample: int, draw: int) -> str:
        text = self.texts[sample]
        generator = np.random.default_rng([self.seed, draw])
        for augmentation in self.augmentations:
            try:
                text = augmentation(text, generator)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise UsageError(
                    f"the augmentation {name_of(augmentation)} failed on training sample {sample}: {reason}"
                ) from error
            if not isinstance(text, str) or not text:
                raise UsageError(
                    f"expected the augmentation {name_of(augmentation)} to return a text, got {text!r:.64} for "
                    f"training sample {sample}; where there is nothing to change, return the text itself"
                )
        return text

    def __reduce__(self) -> tuple[type["_LeftBehind"], tuple[()]]:
        return _LeftBehind, ()  # a worker only reads, and has no use for the texts, nor for what cannot be pickled

    def __deepcopy__(self, memo: dict[int, Any]) -> "Augmenter":
        return self


class _LeftBehind:
    """What another process has in place of an augmenter."""

    def __call__(self, batch: Batch, draws: Ids) -> Batch:
        raise UsageError("augmentations stay in the process that has set up the data; set it up in the one that trains")


def checked(
    augmentations: Sequence[Augmentation | Mapping[str, Any]] | None,
) -> tuple[list[Augmentation], list[Spec | str] | None]:
    """What ``augmentations`` of a data module means, and its description for a checkpoint, from which it is made again.

    Raises:
        UsageError: If one cannot be called, cannot be made again, or is to be prepared for texts that are not known.
    """
    found: list[Augmentation] = []
    for given in augmentations or []:
        augmentation = from_spec(given) if isinstance(given, Mapping | str) else given
        if isinstance(augmentation, type) or not callable(augmentation):
            raise UsageError(
                f"expected augmentations to be called with a text and a generator, such as SentenceShuffle(), got "
                f"{augmentation!r:.64}"
            )
        before = [other for other in found if not isinstance(other, PreparedAugmentation)]
        if isinstance(augmentation, PreparedAugmentation) and before:
            raise UsageError(
                f"{name_of(augmentation)} prepares itself for the training texts before training, and cannot know what "
                f"{name_of(before[0])} makes of them: put it in front"
            )
        found.append(augmentation)
    return found, [to_spec(augmentation) for augmentation in found] or None
