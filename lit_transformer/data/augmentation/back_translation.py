"""Texts said in other words by a detour through another language."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info

from lit_transformer.data.augmentation.remembered import Remembered
from lit_transformer.data.augmentation.sentence_shuffle import check_probability
from lit_transformer.data.augmentation.specs import name_of
from lit_transformer.data.augmentation.translators import Translator, load_translator
from lit_transformer.errors import UsageError

_SECONDS_BETWEEN_LINES = 10.0


class BackTranslation:
    """Translate a text into another language and back (Sennrich et al. 2016; for paraphrases, Yu et al. 2018, QANet).

    All training texts are translated before training, each once, in batches of like length. Several processes share
    the work. With translators that are models, one is in memory at a time, and none in training. What a text becomes
    goes into ``file``, if there is one, so that a run that is resumed, on another machine, too, has it from there.

    Args:
        to: Translates into the other language: a checkpoint of :class:`~lit_transformer.LitSeq2Seq`, the folder or name
            of a Hugging Face model for one pair of languages, or anything that makes of a list of texts a list of
            translations; in a configuration, a class whose instances do.
        back: Translates from it.
        probability: Of a change, each time a text is trained on.
        batch_size: Texts to translate at once.
        file: Where to keep what texts become, as JSON lines; for one pair of translators.

    Raises:
        UsageError: If an argument is out of range; when texts are translated, if a translator cannot be loaded, fails,
            or returns something else, or if the file is of other translators.

    Cost: two translations of each training text, without a file also when a run is resumed, and the memory for the
    result, as much as the texts take; what comes back empty stays as it was. In training, a look into a table.

    Example:
        >>> swap = BackTranslation(lambda texts: [t.upper() for t in texts], lambda texts: [t.title() for t in texts])
        >>> swap.prepare(["to be or not", "to be"])
        ['To Be', 'To Be Or Not']
        >>> sorted({swap("to be", np.random.default_rng(seed)) for seed in range(9)})
        ['To Be', 'to be']
    """

    def __init__(
        self,
        to: str | Translator,
        back: str | Translator,
        probability: float = 0.5,
        batch_size: int = 32,
        file: str | None = None,
    ) -> None:
        check_probability(probability)
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        self.to, self.back, self.probability, self.batch_size, self.file = to, back, probability, batch_size, file
        self._made: dict[str, str] = {}

    def prepare(self, texts: Sequence[str]) -> list[str]:
        """Translate what is new, and return what the texts become."""
        remembered = None if self.file is None else Remembered(Path(self.file), [_name(self.to), _name(self.back)])
        if remembered is not None and not self._made:
            self._made = _gathered(lambda rank, ranks: {} if rank else remembered.read())[0]
        new = sorted(set(texts) - self._made.keys(), key=lambda text: (len(text), text))
        if new:
            with torch.random.fork_rng(devices=[]):  # a model that is loaded begins with random weights
                shares = _gathered(lambda rank, ranks: self._there_and_back(new[rank::ranks]))
            for rank, share in enumerate(shares):
                pairs = zip(new[rank :: len(shares)], share, strict=True)
                self._made |= {text: again.strip() or text for text, again in pairs}
            same = sum(self._made[text] == text for text in new)
            rank_zero_info(f"Back-translation: {len(new):,} texts, of which {same:,} are as they were.")
            if remembered is not None:
                _gathered(lambda rank, ranks: None if rank else remembered.write(self._made))
        return sorted({self._made[text] for text in texts} - set(texts))

    def __call__(self, text: str, generator: np.random.Generator) -> str:
        """The text, or its translation back."""
        if generator.random() >= self.probability:
            return text
        if text not in self._made:
            raise UsageError("it has not been translated; set up the data for fit, with this augmentation in front")
        return self._made[text]

    def _there_and_back(self, texts: list[str]) -> list[str]:
        return self._translate(self.back, self._translate(self.to, texts, "there"), "back")

    def _translate(self, translator: str | Translator, texts: list[str], way: str) -> list[str]:
        """The translation of each text; nothing of nothing."""
        if not texts:
            return []
        said_at = time.monotonic()
        translate = load_translator(translator) if isinstance(translator, str) else translator
        found: list[str] = []
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            if asked := [text for text in batch if text.strip()]:
                answers = iter(_checked(translator, translate, asked))
            found += [next(answers) if text.strip() else "" for text in batch]
            if time.monotonic() - said_at > _SECONDS_BETWEEN_LINES:
                said_at = time.monotonic()
                rank_zero_info(f"Back-translation, {way}: {len(found):,} of {len(texts):,} texts.")
        return found


def _checked(translator: str | Translator, translate: Translator, texts: list[str]) -> list[str]:
    """What a translator makes of some texts."""
    name = _name(translator)
    try:
        found: Any = translate(list(texts))
    except Exception as error:
        raise UsageError(
            f"the translator {name} failed on {texts[0]!r:.64}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, list) or len(found) != len(texts) or not all(isinstance(text, str) for text in found):
        raise UsageError(
            f"expected the translator {name} to return a list of {len(texts)} texts for as many, got {found!r:.64}"
        )
    return list(found)


def _name(translator: str | Translator) -> str:
    return translator if isinstance(translator, str) else name_of(translator)


def _gathered(make: Callable[[int, int], Any]) -> list[Any]:
    """What each process makes, given its rank and how many there are; if one fails, all do."""
    if not (dist.is_available() and dist.is_initialized()):
        return [make(0, 1)]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        mine = make(rank, ranks)
    except UsageError as error:
        mine = error
    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, mine)
    for part in found:
        if isinstance(part, UsageError):
            raise part
    return found
