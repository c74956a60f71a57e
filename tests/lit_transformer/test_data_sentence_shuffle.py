"""Sentences in another order: all orders, as often as it says, and nothing else moved."""

from collections import Counter

import numpy as np
import pytest

from lit_transformer import SentenceShuffle
from lit_transformer.data.augmentation.sentence_shuffle import _split
from lit_transformer.errors import UsageError


def test_what_a_sentence_is():
    text = 'He said "No." (Did he?) Yes... 3.5 is a.b no end!\n\nLast one'
    assert _split(text) == (
        ['He said "No."', "(Did he?)", "Yes...", "3.5 is a.b no end!", "Last one"],
        [" ", " ", " ", "\n\n"],
    )
    assert _split("一。二。 三") == (["一。", "二。", "三"], ["", " "])
    assert _split("One.") == (["One."], [])


def test_every_other_order_is_as_likely_and_white_space_stays():
    shuffle, generator = SentenceShuffle(0.75), np.random.default_rng(0)
    counts = Counter(shuffle(" A. B!\n\nC? ", generator) for _ in range(6000))
    assert counts.keys() == {
        f" {a} {b}\n\n{c} "
        for a, b, c in [
            ("A.", "B!", "C?"), ("A.", "C?", "B!"), ("B!", "A.", "C?"),
            ("B!", "C?", "A."), ("C?", "A.", "B!"), ("C?", "B!", "A."),
        ]
    }  # fmt: skip
    assert abs(counts.pop(" A. B!\n\nC? ") - 1500) < 4 * (6000 * 0.25 * 0.75) ** 0.5
    assert all(abs(count - 900) < 4 * (6000 * 0.15 * 0.85) ** 0.5 for count in counts.values())


def test_one_sentence_stays_and_two_are_always_swapped():
    generator = np.random.default_rng(0)
    assert SentenceShuffle(1.0)("Only one. ", generator) == "Only one. "
    assert {SentenceShuffle(1.0)("A. B.", generator) for _ in range(50)} == {"B. A."}
    assert SentenceShuffle(1.0)("A. A.", generator) == "A. A."


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1])
def test_out_of_range(probability):
    with pytest.raises(UsageError, match="probability must be above 0 and at most 1"):
        SentenceShuffle(probability)
