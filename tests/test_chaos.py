"""A run that is killed at every kind of moment ends as the run that was not."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import chaos


def killed(tmp_path, points, workers=0, after=0):
    """Kill one run at these points, and compare it with the undisturbed one."""
    chaos.supervise(tmp_path / "undisturbed", workers, [], None, 0)
    result = chaos.supervise(tmp_path / "killed", workers, [(point, after) for point in points], None, 0)
    assert result["kills"] == len(points) - len(result["left"])  # every fault has fired
    assert result["unused"] == []
    assert max(result["lost"]) <= chaos.EVERY
    assert chaos.compare(tmp_path / "undisturbed", tmp_path / "killed") == []
    return result


def test_killed_in_a_save_in_a_validation_and_in_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "STEPS", 30)
    assert killed(tmp_path, ["renamed", "writing", "validation", "batch_end"], after=1)["left"] == []


@pytest.mark.slow
def test_killed_at_every_point(tmp_path):
    points = list(chaos.POINTS)
    killed(tmp_path / "a", points[:7])
    killed(tmp_path / "b", points[7:], workers=2)


def test_a_difference_is_found(tmp_path):
    assert not chaos.same({"a": [1.0]}, {"a": [1.5]})
    file = tmp_path / "metrics.csv"
    file.write_text("step,key,value\n1,a,2\n1,a,2\n")
    with pytest.raises(AssertionError, match="more than once"):
        chaos.metrics(file)
