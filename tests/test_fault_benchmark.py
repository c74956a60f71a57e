"""The fault benchmark in small: who survives what, with margins far from the figures."""

import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs():
    """Final losses by fault and policy, seed 0."""
    sys.path.insert(0, str(BENCHMARKS))
    from fault_runs import POLICIES, faults_at, run

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    faults = faults_at(240)
    found = {"none": run(0, [], [])}
    for fault in ("exponent bit", "LR x60, 3 steps", "shuffled labels, 10"):
        for policy in ("clip 1.0", "LossSpikeRecovery"):
            found[fault, policy] = run(0, POLICIES[policy](), faults[fault])
    found["NaN loss", "clip 1.0"] = run(0, [], faults["NaN loss"])
    found["healthy", "LossSpikeRecovery"] = run(0, POLICIES["LossSpikeRecovery"](), [])
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCHMARKS))
    return found


def test_nothing_happens_to_a_healthy_run(runs):
    assert runs["healthy", "LossSpikeRecovery"].actions == []
    assert runs["healthy", "LossSpikeRecovery"].loss == runs["none"].loss


def test_without_protection_faults_cost_a_run_dearly(runs):
    assert math.isnan(runs["NaN loss", "clip 1.0"].loss)
    assert not runs["exponent bit", "clip 1.0"].loss < runs["none"].loss + 0.5
    assert runs["LR x60, 3 steps", "clip 1.0"].loss > runs["none"].loss + 0.15


@pytest.mark.parametrize("fault", ["exponent bit", "LR x60, 3 steps", "shuffled labels, 10"])
def test_with_recovery_they_cost_next_to_nothing(runs, fault):
    found = runs[fault, "LossSpikeRecovery"]
    assert not found.ended
    assert found.loss < runs["none"].loss + 0.05
    rollbacks = [kind for _, kind in found.actions].count("rollback")
    assert rollbacks == (0 if "labels" in fault else 1)
