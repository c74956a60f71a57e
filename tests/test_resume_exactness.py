"""The table of resumes, ours beside Lightning's."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from resume_exactness import OURS, THEIRS, run


@pytest.mark.slow
def test_with_every_loader_a_resumed_run_is_the_same_and_without_it_is_not():
    outcomes = [(kind, outcome) for cells in run(quick=True).values() for (_, kind), outcome in cells.items()]
    assert all(outcome.identical for kind, outcome in outcomes if kind == OURS)
    assert not any(outcome.identical for kind, outcome in outcomes if kind == THEIRS)
