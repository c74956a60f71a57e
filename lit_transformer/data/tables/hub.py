"""Data sets of Hugging Face: from the hub, its cache, a folder, or a Parquet file."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_transformer.errors import UsageError


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings about data sets that do not go together."""
    name, splits = settings["dataset"], settings["dataset_splits"]
    if name is not None and settings["files"] is not None:
        raise UsageError(f"files and dataset={name} are both given to train on; leave one of them out")
    if name is None and (splits is not None or settings["dataset_config"] is not None):
        raise UsageError("dataset_config and dataset_splits are about a dataset, and none is set; set dataset")
    if unknown := sorted((splits or {}).keys() - {"train", "validation", "test"}):
        raise UsageError(f"dataset_splits has names for train, validation and test, got one for {unknown[0]!r}")


def load(name: str, config: str | None = None) -> Mapping[str, Any]:
    """A data set by splits.

    Args:
        name: A folder, as ``save_to_disk`` writes it or as the hub has it; or ``OWNER/NAME`` on the hub, from the
            cache where the hub cannot be reached or ``HF_HUB_OFFLINE=1`` is set.
        config: Which of its configurations.

    Raises:
        UsageError: If it cannot be loaded.
    """
    datasets = _datasets()
    folder = Path(name).expanduser()
    where = "in that folder" if folder.is_dir() else "on the hub or in its cache, and there is no such folder"
    try:
        with _quiet(datasets):
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                found = datasets.load_from_disk(str(folder))
            else:
                found = datasets.load_dataset(str(folder) if folder.is_dir() else name, config)
    except Exception as error:  # of the network, the hub, pyarrow, pandas: no common base
        raise UsageError(f"no data set {_with(name, config)} can be loaded: not {where}. {_reason(error)}") from None
    return found if isinstance(found, Mapping) else {"train": found}


def choose(there: Mapping[str, Any], splits: Mapping[str, str] | None, name: str) -> dict[str, Any]:
    """Which splits are for training, validation and test.

    Args:
        there: The splits by their names.
        splits: The names of those that are ``train``, ``validation`` and ``test``; by default these, if there are any.
        name: Of the data set.

    Raises:
        UsageError: If there is no such split.

    Example:
        >>> choose({"train": 1, "dev": 2}, {"train": "train", "validation": "dev"}, "a/b")
        {'train': 1, 'validation': 2}
    """
    if splits is None:
        splits = {split: split for split in ("train", "validation", "test") if split in there or split == "train"}
    for split, wanted in splits.items():
        if wanted not in there:
            raise UsageError(
                f"expected a split {wanted!r} of {name} for {split}, got {', '.join(map(repr, there))}; set "
                "dataset_splits"
            )
    return {split: there[wanted] for split, wanted in splits.items()}


def parquet(path: Path) -> Any:
    """The table in a file.

    Raises:
        UsageError: If it cannot be read.
    """
    datasets = _datasets()
    try:
        with _quiet(datasets):
            return datasets.load_dataset("parquet", data_files=[str(path)], split="train")
    except Exception as error:  # pyarrow's errors have no common base
        if "corresponds to no data" in str(error):
            raise UsageError(f"expected rows in {path}, got none") from None
        raise UsageError(f"{path} cannot be read as parquet: {_reason(error)}") from None


def rows(dataset: Any, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows with their numbers, from 1; classes by their names, and none where the number is below 0."""
    names = {column: getattr(dataset.features[column], "names", None) for column in columns}
    values = ([_named(value, names[column]) for value in dataset[column]] for column in columns)
    for number, row in enumerate(zip(*values, strict=True), 1):
        yield number, dict(zip(columns, row, strict=True))


def _named(value: Any, names: Sequence[str] | None) -> Any:
    if names is None or value is None:
        return value
    return names[value] if value >= 0 else None


def _with(name: str, config: str | None) -> str:
    return name if config is None else f"{name} ({config})"


def _reason(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UsageError("Parquet and data sets need datasets (extra hf): pip install datasets") from None
    return datasets


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without progress bars."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.utils.logging.enable_progress_bar()
