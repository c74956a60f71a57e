"""Arrays written part by part are the files that numpy writes."""

import numpy as np
import pytest

from lit_transformer.data.text.array_file import ArrayFile


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("sizes", [[], [0, 3], [1] * 11, [123_456, 7]])
def test_file_is_the_one_that_numpy_saves(tmp_path, dtype, sizes):
    parts = [np.arange(size) % 65_536 for size in sizes]
    with ArrayFile(tmp_path / "ours.npy", dtype) as file:
        for part in parts:
            file.append(part)
    assert file.length == sum(sizes)
    np.save(tmp_path / "theirs.npy", np.concatenate([*parts, np.empty(0, dtype)]).astype(dtype))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
