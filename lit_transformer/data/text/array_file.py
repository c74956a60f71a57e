"""An array that grows on disk."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray


class ArrayFile:
    """A one-dimensional ``.npy`` file that is written part by part, as :func:`numpy.save` would write the whole.

    Args:
        path: The file.
        dtype: Of the array.

    Attributes:
        length: How much is written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.npy")
        >>> with ArrayFile(path, np.uint16) as file:
        ...     file.append(np.arange(2))
        ...     file.append(np.arange(3))
        >>> np.load(path)
        array([0, 1, 0, 1, 2], dtype=uint16)
    """

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._write_header()

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()

    def append(self, part: NDArray[Any]) -> None:
        """Write more."""
        self._file.write(part.astype(self.dtype).tobytes())
        self.length += len(part)

    def _write_header(self) -> None:
        # 128 bytes for any length: numpy leaves room for its digits.
        description = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        npy.write_array_header_1_0(self._file, description)
