"""Columns of files, read by Hugging Face's ``datasets``."""

from typing import Any

from lit_transformer.data.corpus import find
from lit_transformer.errors import UsageError

_FORMATS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def read_table(files: str | list[str], text_column: str, label_column: str) -> list[tuple[str, str]]:
    """The texts and classes of tables, as strings.

    Args:
        files: Paths or globs, all of one format: ``.csv``, ``.tsv``, ``.json`` or ``.jsonl`` (an object a line), or
            ``.parquet``.
        text_column: Name of the column with the text.
        label_column: Name of the column with the class.

    Raises:
        UsageError: If a file cannot be read, a column is missing, or a text or class is; ``datasets`` is missing.
    """
    paths = [str(path) for path in find(files)]
    endings = sorted({path.rpartition(".")[2].lower() for path in paths})
    if len(endings) > 1 or endings[0] not in _FORMATS:
        raise UsageError(f"expected files that all end in one of .{', .'.join(_FORMATS)}, got .{', .'.join(endings)}")
    table = _load(paths, endings[0])
    if missing := [name for name in (text_column, label_column) if name not in table.column_names]:
        raise UsageError(
            f"expected a column {missing[0]!r} in {paths[0]}, got {', '.join(map(repr, table.column_names))}; "
            "set text_column and label_column"
        )
    texts, labels = table[text_column], table[label_column]
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if text in (None, "") or label in (None, ""):
            which = text_column if text in (None, "") else label_column
            raise UsageError(
                f"expected a text and a class in each row, got no {which!r} in row {row + 1} of {paths[0]}"
            )
    return [(str(text), str(label)) for text, label in zip(texts, labels, strict=True)]


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
