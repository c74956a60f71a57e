"""Rows whose sequences are longer than they may be: cut off, or left out."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from lit_transformer.data.batching.order import Ids
from lit_transformer.data.batching.ragged import Ragged
from lit_transformer.data.tables.records import BadRecords, Records

Encoded = tuple[str, Ragged, Ids]
"""The setting that limits some sequences, their ids, which are no longer than that, and how long they were before."""


def within_limits(
    records: Records, sequences: dict[str, Encoded], settings: Mapping[str, Any], bad: BadRecords, cut: Counter[str]
) -> tuple[Records, list[Ragged]]:
    """The rows that may be used, and their sequences.

    Args:
        records: The rows.
        sequences: Their sequences, by what a person calls them.
        settings: The limits; and ``too_long``, ``"truncate"`` or ``"refuse"``.
        bad: What is told of rows that are refused.
        cut: Counts those that are not.

    Raises:
        UsageError: If too many are refused.

    Example:
        >>> records, cut = Records.of([("abc", ""), ("d", "")], ("line", "x.csv")), Counter()
        >>> texts = {"texts": ("max_length", Ragged([[1, 2], [4]]), np.array([3, 1]))}
        >>> kept, rows = within_limits(records, texts, {"max_length": 2, "too_long": "truncate"}, BadRecords(), cut)
        >>> len(kept), len(rows[0]), dict(cut)
        (2, 2, {'texts at 2 tokens': 1})
        >>> kept, rows = within_limits(records, texts, {"max_length": 2, "too_long": "refuse"}, BadRecords(1), cut)
        >>> len(kept), rows[0][0].tolist()
        (1, [4])
    """
    kept = np.ones(len(records), dtype=bool)
    for what, (setting, _, lengths) in sequences.items():
        limit = settings[setting]
        too_long = np.flatnonzero(kept & (lengths > limit)).tolist()
        if settings["too_long"] == "truncate":
            cut[f"{what} at {limit} tokens"] += len(too_long)
            continue
        for i in too_long:
            bad.add(
                f"expected {what} of at most {setting}={limit} tokens, as too_long=refuse says, got {lengths[i]} in "
                f"{records.place(i)}"
            )
        kept[too_long] = False
    ids = np.flatnonzero(kept)
    return records.take(ids), [rows.take(ids) for _, rows, _ in sequences.values()]
