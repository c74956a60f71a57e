"""On two ranks: what is resumed is the same run, one rank's signal stops both, one rank's full disk hangs nobody."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from reliability_worker import CORNERS, REST

from helpers import two_ranks


def launch(worker, out, name, *arguments):
    return two_ranks(Path(__file__).with_name(worker), out, name, *arguments)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("reliability_worker.py", tmp_path_factory.mktemp("reliability"), "rank", "corners")


def test_a_sharded_checkpoint_is_verified_file_by_file(tmp_path):
    for found in launch("sharded_worker.py", tmp_path, "sharded"):
        assert found["files"] == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
        assert "__0_0.distcp: its contents have changed" in found["refused"]
        assert (found["resumed"], found["newest"]) == (14, 14)


def same_run(whole, first, rest):
    assert rest["digest"] == whole["digest"]
    assert len(rest["seen"]) < len(whole["seen"])
    assert rest["seen"] == whole["seen"][-len(rest["seen"]) :]


def same_rows(whole, first, rest):
    """On rank zero, which is the one that logs."""
    assert {tuple(row) for row in first["rows"] + rest["rows"]} == {tuple(row) for row in whole["rows"]}


@pytest.mark.parametrize("name", CORNERS)
def test_a_resumed_run_is_the_same_on_both_ranks(ranks, name):
    same_everywhere(ranks, name)


@pytest.mark.slow
def test_the_rest_of_the_grid_on_both_ranks(tmp_path):
    ranks = launch("reliability_worker.py", tmp_path, "rank", "grid")
    for name in REST:
        same_everywhere(ranks, name)


def same_everywhere(ranks, name):
    for rank in ranks:
        assert "Killed" in rank[f"first-{name}"]["ended"]
        same_run(rank[f"whole-{name}"], rank[f"first-{name}"], rank[f"rest-{name}"])
    same_rows(*(ranks[0][f"{part}-{name}"] for part in ("whole", "first", "rest")))
    assert ranks[0][f"whole-{name}"]["seen"] != ranks[1][f"whole-{name}"]["seen"]
    assert ranks[0][f"rest-{name}"]["digest"] == ranks[1][f"rest-{name}"]["digest"]


@pytest.mark.parametrize("name", ["shut", "shut-validation"])
def test_a_signal_to_one_rank_stops_both_and_the_run_goes_on(ranks, name):
    steps = {rank[f"{name}-first"]["step"] for rank in ranks}
    assert len(steps) == 1
    for rank in ranks:
        assert rank[f"{name}-first"]["code"] == 143
        same_run(rank["whole-middle-0-1"], rank[f"{name}-first"], rank[f"{name}-rest"])
    same_rows(ranks[0]["whole-middle-0-1"], ranks[0][f"{name}-first"], ranks[0][f"{name}-rest"])


def test_a_full_disk_of_one_rank_is_everybodys_failed_save(ranks):
    for rank in ranks:
        assert rank["failing"]["ended"] == "None"
        assert rank["failing"]["digest"] == rank["whole-middle-0-1"]["digest"]
        assert "No space left on device" in rank["failed"]["message"]
        assert "Stopped after 3 saves in a row" in rank["failed"]["message"]
        assert rank["failed"]["step"] == 16
    assert ranks[0]["kept"] == {"failing": [12, 16, 20, 24, 28, 30, 4], "failed": [4]}


def test_early_stopping_is_one_decision(ranks):
    assert ranks[0]["early"] == ranks[1]["early"]
    assert ranks[0]["early"]["step"] == 15  # best after step 5, not at 10 and 15
    assert ranks[0]["early"]["best"] == [5, 5.0]
