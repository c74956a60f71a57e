"""A dataset of which some samples cannot be read."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset


class InjectedDataError(RuntimeError):
    """A sample could not be read, because of a ``data_error``."""


class FailingDataset(Dataset[Any]):
    """Asks the injector before it reads. In a worker both are copies, but their counts are shared."""

    def __init__(self, dataset: Any, read: Callable[[Any], None]) -> None:
        self.dataset, self._read = dataset, read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        self._read(index if hasattr(index, "__contains__") else [index])
        return self.dataset[index]

    def __getitems__(self, indices: Any) -> Any:
        self._read(indices)
        together = getattr(self.dataset, "__getitems__", None)
        return together(indices) if together else [self.dataset[index] for index in indices]
