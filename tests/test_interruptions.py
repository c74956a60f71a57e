"""The table of interruptions, with our callbacks."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from interruptions import OURS, right, run


@pytest.mark.slow
def test_a_process_tells_the_truth_and_leaves_what_can_be_gone_on_from():
    for event, kinds in run((OURS,)).items():
        assert right(event, *kinds[OURS]), (event, kinds[OURS])


def test_what_is_wrong_is_found():
    assert not right("NaN losses", 0, 40, False)
    assert not right("SIGTERM", 0, 6, True)
    assert not right("SIGTERM", 143, 4, True)
    assert not right("a logger raises", 1, 4, True)
