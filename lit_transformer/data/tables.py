"""Columns of files, read by Hugging Face's ``datasets``."""

from collections.abc import Mapping
from typing import Any

from lit_transformer.data.corpus import find
from lit_transformer.errors import UsageError

_FORMATS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def read_table(
    files: str | list[str], first_column: str, second_column: str, settings: str = "text_column and label_column"
) -> list[tuple[str, str]]:
    """Two columns of tables, as strings.

    Args:
        files: Paths or globs, all of one format: ``.csv``, ``.tsv``, ``.json`` or ``.jsonl`` (an object a line), or
            ``.parquet``.
        first_column: Name of a column.
        second_column: Name of another.
        settings: Where a person sets the names.

    Raises:
        UsageError: If a file cannot be read, a column or a value is missing, or ``datasets`` is.
    """
    paths = [str(path) for path in find(files)]
    endings = sorted({path.rpartition(".")[2].lower() for path in paths})
    if len(endings) > 1 or endings[0] not in _FORMATS:
        raise UsageError(f"expected files that all end in one of .{', .'.join(_FORMATS)}, got .{', .'.join(endings)}")
    table = _load(paths, endings[0])
    if missing := [name for name in (first_column, second_column) if name not in table.column_names]:
        raise UsageError(
            f"expected a column {missing[0]!r} in {paths[0]}, got {', '.join(map(repr, table.column_names))}; "
            f"set {settings}"
        )
    rows = list(zip(table[first_column], table[second_column], strict=True))
    for number, row in enumerate(rows, 1):
        for name, value in zip((first_column, second_column), row, strict=True):
            if value in (None, ""):
                raise UsageError(f"expected a value in each column, got no {name!r} in row {number} of {paths[0]}")
    return [(str(first), str(second)) for first, second in rows]


def read_tables(settings: Mapping[str, Any], first: str, second: str) -> dict[str, list[tuple[str, str]]]:
    """The training, validation and test rows that have files of their own.

    Args:
        settings: ``files``, ``val_files`` and ``test_files``, and the names of two columns.
        first: Which setting names the first column.
        second: Which the second.
    """
    given = {"train": settings["files"], "validation": settings["val_files"], "test": settings["test_files"]}
    columns = settings[first], settings[second]
    return {
        split: read_table(files, *columns, f"{first} and {second}")
        for split, files in given.items()
        if files is not None
    }


def _load(paths: list[str], ending: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError("reading tables needs datasets: pip install 'lit-transformer[hf]'") from None
    options = {"sep": "\t"} if ending == "tsv" else {}
    bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        return datasets.load_dataset(_FORMATS[ending], data_files=paths, split="train", **options)
    except Exception as error:  # pyarrow's and pandas' errors have no common base
        if "corresponds to no data" in str(error):
            raise UsageError(f"expected rows in {paths[0]}, got none") from None
        cause = error.__cause__ or error
        raise UsageError(f"{paths[0]} cannot be read as {ending}: {' '.join(str(cause).split())[:300]}") from None
    finally:
        if bars:
            datasets.utils.logging.enable_progress_bar()
