"""Columns of files and of data sets of Hugging Face."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_transformer.data.tables import hub
from lit_transformer.data.tables.records import BadRecords, Records
from lit_transformer.data.tables.text_tables import Row, is_json_array, read_delimited, read_json_array, read_json_lines
from lit_transformer.data.text.corpus import find
from lit_transformer.errors import UsageError

_ENDINGS = ("csv", "tsv", "json", "jsonl", "parquet")


@dataclass(frozen=True)
class Columns:
    """Which columns are read.

    Args:
        settings: Where a person sets their names.
        source: The name of the column of texts.
        target: Of what is to be said; None where that is not read.
        weight: Of how much a row counts; None where all count alike.
    """

    settings: str
    source: str
    target: str | None = None
    weight: str | None = None

    def named(self) -> list[str]:
        """The names."""
        return [name for name in (self.source, self.target, self.weight) if name is not None]

    def check(self, there: Iterable[str], where: str) -> None:
        """Refuse a table that lacks one."""
        there = list(there)
        for name in self.named():
            if (count := there.count(name)) != 1:
                wanted = "a column" if not count else "one column"
                got = ", ".join(map(repr, there))
                raise UsageError(f"expected {wanted} {name!r} in {where}, got {got}; set {self.settings}")


def read_files(files: str | list[str], columns: Columns, bad: BadRecords) -> Records:
    """The rows of tables, in the order of the files' names, values as strings.

    Args:
        files: Paths or globs, all of one format: ``.csv``, ``.tsv``, ``.json`` or ``.jsonl`` (an object a line, or a
            list of them), or ``.parquet``, which needs ``datasets``.
        columns: Which columns.
        bad: What is told of rows that cannot be used.

    Raises:
        UsageError: If a file cannot be read, or has no such column; if there are too many bad rows; if no row is left.
    """
    paths = find(files)
    endings = sorted({path.suffix.lower().removeprefix(".") for path in paths})
    if len(endings) > 1 or endings[0] not in _ENDINGS:
        raise UsageError(f"expected files that all end in one of .{', .'.join(_ENDINGS)}, got .{', .'.join(endings)}")
    records = Records(weights=None if columns.weight is None else [])
    for path in paths:
        unit, rows = _rows(path, endings[0], columns, bad)
        _append(records, rows, (unit, str(path)), columns, bad)
    if not records:
        raise UsageError(f"expected rows in {paths[0]}, got none")
    return records


def read_split(dataset: Any, name: str, columns: Columns, bad: BadRecords) -> Records:
    """The rows of a split of a data set of Hugging Face; see :func:`read_files`."""
    columns.check(dataset.column_names, name)
    records = Records(weights=None if columns.weight is None else [])
    _append(records, hub.rows(dataset, columns.named()), ("row", name), columns, bad)
    if not records:
        raise UsageError(f"expected rows in {name}, got none")
    return records


def _rows(path: Path, ending: str, columns: Columns, bad: BadRecords) -> tuple[str, Iterable[Row]]:
    """What is counted in a file, and its rows."""

    def check(there: list[str]) -> None:
        columns.check(there, str(path))

    if ending == "parquet":
        table = hub.parquet(path)
        check(table.column_names)
        return "row", hub.rows(table, columns.named())
    if ending in ("csv", "tsv"):
        return "line", read_delimited(path, bad, check, "\t" if ending == "tsv" else ",")
    if is_json_array(path):
        return "item", read_json_array(path, bad)
    return "line", read_json_lines(path, bad)


def _append(records: Records, rows: Iterable[Row], origin: tuple[str, str], columns: Columns, bad: BadRecords) -> None:
    """Add the rows that have what is needed."""
    unit, name = origin
    records.origins.append(origin)
    for number, values in rows:
        if problem := _problem(values, columns):
            bad.add(problem.format(f"{unit} {number} of {name}"))
            continue
        records.sources.append(str(values[columns.source]))
        if columns.target is not None:
            records.targets.append(str(values[columns.target]))
        if columns.weight is not None and records.weights is not None:
            records.weights.append(float(values[columns.weight]))
        records.origin.append(len(records.origins) - 1)
        records.number.append(number)


def _problem(values: Mapping[str, Any], columns: Columns) -> str:
    """What is wrong with a row, ``{}`` for its place; nothing, if it can be used."""
    for column in columns.named():
        value = values.get(column)
        if value in (None, ""):
            there = "" if column in values else f", which has {', '.join(map(repr, values))}; set {columns.settings}"
            return _literal(f"expected a value in each column, got no {column!r} in ") + "{}" + _literal(there)
        if isinstance(value, dict | list):
            return f"expected a text as {_literal(repr(column))} in {{}}, got a {type(value).__name__}"
        if column != columns.weight and not _is_text(str(value)):
            return f"expected a text as {_literal(repr(column))} in {{}}, got a zero byte or half a surrogate pair"
    if columns.weight is not None and not _is_weight(values[columns.weight]):
        return f"expected a weight of at least 0 in {{}}, got {_literal(repr(values[columns.weight]))}"
    return ""


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _is_text(value: str) -> bool:
    if "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_weight(value: Any) -> bool:
    try:
        return 0 <= float(value) < math.inf
    except (TypeError, ValueError):
        return False
