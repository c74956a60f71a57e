"""Texts and what is to be said of them, each with the place it is from; and those that cannot be used."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lit_transformer.data.batching.order import Ids
from lit_transformer.data.text.functions import Sample
from lit_transformer.errors import UsageError

_NAMED = 3


@dataclass
class Records:
    """Rows of tables, column by column.

    Args:
        sources: The texts.
        targets: What is to be said of each; empty where that is not known.
        weights: How much each counts in training; None for all alike.
        origins: What has been read: what is counted in it, and its name.
        origin: Which of them each row is from.
        number: Which of those that are counted there each row is.

    Example:
        >>> records = Records.of([("a", "b"), ("c", "d")], ("line", "x.csv")).take(np.array([1]))
        >>> records[0], records.place(0)
        (('c', 'd'), 'line 2 of x.csv')
    """

    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    weights: list[float] | None = None
    origins: list[tuple[str, str]] = field(default_factory=list)
    origin: list[int] = field(default_factory=list)
    number: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, samples: Iterable[Sample], origin: tuple[str, str]) -> "Records":
        """Rows from one place."""
        sources, targets = map(list, zip(*samples, strict=True)) if (samples := list(samples)) else ([], [])
        n = len(sources)
        return cls(sources, targets, None, [origin], [0] * n, list(range(1, n + 1)))

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, i: int) -> Sample:
        return self.sources[i], self.targets[i]

    def __iter__(self) -> Iterator[Sample]:
        return zip(self.sources, self.targets, strict=True)

    def place(self, i: int) -> str:
        """Where a person finds a row."""
        unit, name = self.origins[self.origin[i]]
        return f"{unit} {self.number[i]} of {name}"

    def take(self, ids: Ids) -> "Records":
        """Some of the rows."""
        chosen = ids.tolist()
        return Records(
            [self.sources[i] for i in chosen],
            [self.targets[i] for i in chosen] if self.targets else [],
            None if self.weights is None else [self.weights[i] for i in chosen],
            self.origins,
            [self.origin[i] for i in chosen],
            [self.number[i] for i in chosen],
        )


class BadRecords:
    """Records that cannot be used: so many may be left out, and are counted.

    Args:
        most: How many.

    Example:
        >>> bad = BadRecords(1)
        >>> bad.add("expected 2 fields in line 7 of a.csv, got 3")
        >>> print(bad.describe())
        1 bad record left out: expected 2 fields in line 7 of a.csv, got 3
    """

    def __init__(self, most: int = 0) -> None:
        self.most, self.count = most, 0
        self.first: list[str] = []

    def add(self, problem: str) -> None:
        """Leave one out.

        Raises:
            UsageError: If it is one too many.
        """
        if not self.most:
            raise UsageError(f"{problem}. Correct it, or set max_bad_records to leave out as many as that.")
        if self.count == self.most:
            raise UsageError(
                f"expected at most max_bad_records={self.most} records that cannot be used, got another: {problem}. "
                f"Those before: {'; '.join(self.first)}{'; …' if self.count > _NAMED else ''}"
            )
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(problem)

    def describe(self) -> str:
        """How many there were, and the first ones."""
        records = "record" if self.count == 1 else "records"
        more = "; …" if self.count > _NAMED else ""
        return f"{self.count:,} bad {records} left out: {'; '.join(self.first)}{more}"


def stratified(classes: list[str], fractions: dict[str, float], seed: int) -> dict[str, NDArray[np.int64]]:
    """Hold out the same fraction of each class, rounded, at random; the rest is for training.

    Returns:
        The places of each split, in order.

    Example:
        >>> parts = stratified(["a", "b"] * 5, {"test": 0.4}, seed=0)
        >>> [len(part) for part in parts.values()], parts["test"].tolist()
        ([6, 4], [3, 4, 8, 9])
    """
    by_class: dict[str, list[int]] = {}
    for i, label in enumerate(classes):
        by_class.setdefault(label, []).append(i)
    generator = np.random.default_rng(seed)
    places: dict[str, list[int]] = {name: [] for name in ("train", *fractions)}
    for members in by_class.values():
        order = generator.permutation(members).tolist()
        for name, fraction in fractions.items():
            count = round(fraction * len(members))
            places[name] += order[:count]
            order = order[count:]
        places["train"] += order
    return {name: np.array(sorted(chosen), dtype=np.int64) for name, chosen in places.items()}
