"""Rows of CSV, TSV and JSON with the line each is on; what is wrong with a line is told, and it is left out."""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lit_transformer.data.tables.records import BadRecords
from lit_transformer.errors import UsageError

Row = tuple[int, Mapping[str, Any]]
"""The line a row begins on, and its values by column."""


def read_delimited(
    path: Path, bad: BadRecords, check: Callable[[list[str]], None], delimiter: str = ","
) -> Iterator[Row]:
    """Rows of a table with a header; blank lines are none.

    Args:
        path: The file, in UTF-8, with or without a byte order mark.
        bad: What is told of rows that are not as wide as the header, or are no UTF-8.
        check: Shown the names of the columns.
        delimiter: What is between two values.

    Raises:
        UsageError: If the file is empty, its header cannot be used, or a quote is never closed.
    """
    with path.open("rb") as file, _long_fields():
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter)
        header = next(reader, None)
        if header is None:
            raise UsageError(f"expected rows in {path}, got an empty file")
        if lines.problem:
            raise UsageError(f"expected UTF-8 in the header of {path}, got {lines.problem}")
        check(header)
        while True:
            lines.start()
            first = lines.number + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                bad.add(f"expected a row in line {first} of {path}, got what csv refuses: {error}")
                continue
            where = f"line {first}" if lines.number == first else f"lines {first} to {lines.number}"
            if lines.at_end and _is_open(lines.taken, delimiter):
                raise UsageError(
                    f"expected the quote that is opened in line {first} of {path} to be closed, got the end of the "
                    'file. Close it, or write " as "" within quotes.'
                )
            if lines.problem:
                bad.add(f"expected UTF-8 in {where} of {path}, got {lines.problem}")
            elif len(row) == len(header):
                yield first, dict(zip(header, row, strict=True))
            elif len(row) > 1 or "".join(row).strip():
                bad.add(f"expected {_fields(len(header))} in {where} of {path}, got {len(row)}")


def read_json_lines(path: Path, bad: BadRecords) -> Iterator[Row]:
    """Objects, one a line.

    Args:
        path: The file, in UTF-8.
        bad: What is told of lines that are something else.

    Raises:
        UsageError: If the file is empty.
    """
    with path.open("rb") as file:
        lines = _Lines(file)
        for text in lines:
            number = lines.number
            if lines.problem:
                bad.add(f"expected UTF-8 in line {number} of {path}, got {lines.problem}")
            elif text.strip():
                try:
                    found = json.loads(text)
                except ValueError as error:
                    found = error
                if isinstance(found, dict):
                    yield number, found
                else:
                    said = f": {found}" if isinstance(found, ValueError) else ""
                    bad.add(f"expected a JSON object in line {number} of {path}, got {text.strip()[:40]!r}{said}")
            lines.start()
        if not lines.number:
            raise UsageError(f"expected rows in {path}, got an empty file")


def _fields(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"


def is_json_array(path: Path) -> bool:
    """Whether a file is one list of objects, not an object a line."""
    with path.open("rb") as file:
        return next((line for line in file if line.strip()), b"").lstrip().startswith(b"[")


def read_json_array(path: Path, bad: BadRecords) -> Iterator[Row]:
    """Objects of a list, numbered from 1.

    Raises:
        UsageError: If the file is no JSON.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"expected JSON in {path}: a list of objects, or an object a line; got {error}") from None
    for number, item in enumerate(found, 1):
        if isinstance(item, dict):
            yield number, item
        else:
            bad.add(f"expected a JSON object as item {number} of {path}, got {str(item)[:40]!r}")


class _Lines:
    """The lines of a file as text, and what is wrong with those since the last :meth:`start`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._next = file.readline()
        self._position = self.number = 0
        self.start()

    def start(self) -> None:
        """Forget the lines before."""
        self.taken: list[str] = []
        self.problem = ""

    @property
    def at_end(self) -> bool:
        """Whether there is no other line."""
        return not self._next

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, self._next = self._next, self._file.readline()
        if not line:
            raise StopIteration
        self.number += 1
        try:
            text = line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            text = line.decode(errors="replace")
            mark = 3 * (self.number == 1 and line.startswith(b"\xef\xbb\xbf"))
            place = error.start + mark
            self.problem = self.problem or (
                f"byte 0x{line[place]:02x} at position {self._position + place} of the file ({error.reason})"
            )
        self._position += len(line)
        self.taken.append(text)
        return text


def _is_open(lines: list[str], delimiter: str) -> bool:
    """Whether a quote is opened in a row, the last one, and not closed."""
    try:
        list(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a text have more than the 131,072 characters that csv allows at first."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)
