"""Sentences in another order."""

import re
from dataclasses import dataclass

import numpy as np

from lit_transformer.errors import UsageError

# What ends a sentence, then the white space after it; the full stops of Chinese and Japanese need none.
_END = re.compile(r"(?:(?<![.!?…])[.!?…]++[\"'”’»)\]]*+(?=\s)|[。！？]++[」』”）]*+)(\s*)")  # noqa: RUF001 - so written


@dataclass(frozen=True)
class SentenceShuffle:
    r"""Put the sentences of a text into another order.

    A sentence ends with a full stop, a question mark or an exclamation mark before white space: an abbreviation ends
    one, too. White space, such as empty lines, stays where it is.

    Args:
        probability: Of a change, for a text of several sentences.

    Raises:
        UsageError: If it is no probability.

    Example:
        >>> SentenceShuffle(1.0)("One. Two!\n\nThree?", np.random.default_rng(0))
        'Three? One.\n\nTwo!'
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        check_probability(self.probability)

    def __call__(self, text: str, generator: np.random.Generator) -> str:
        """The text, or another order of it."""
        if generator.random() >= self.probability:
            return text
        body = text.strip()
        sentences, gaps = _split(body)
        if len(sentences) < 2:
            return text
        order = unchanged = np.arange(len(sentences))
        while (order == unchanged).all():
            order = generator.permutation(len(sentences))
        shuffled = [sentences[i] for i in order]
        joined = "".join(sentence + gap for sentence, gap in zip(shuffled, [*gaps, ""], strict=True))
        return text.replace(body, joined, 1)


def check_probability(probability: float) -> None:
    """Refuse what is none, or never changes anything."""
    if not 0 < probability <= 1:
        raise UsageError(f"probability must be above 0 and at most 1, got {probability}")


def _split(text: str) -> tuple[list[str], list[str]]:
    """The sentences, and what is between them."""
    sentences, gaps, start = [], [], 0
    for end in _END.finditer(text):
        if end.end() < len(text):
            sentences.append(text[start : end.start(1)])
            gaps.append(end[1])
            start = end.end()
    return [*sentences, text[start:]], gaps
