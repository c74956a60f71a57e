"""The benchmark of damaged checkpoints in small: ours is never wrong, and Lightning's default is."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import checkpoint_faults


@pytest.mark.filterwarnings("ignore")
def test_no_damage_leads_to_a_wrong_resume():
    level = logging.getLogger("lightning.pytorch").level
    try:
        results = checkpoint_faults.run(quick=True)
    finally:
        logging.getLogger("lightning.pytorch").setLevel(level)
    assert checkpoint_faults.wrong(results, checkpoint_faults.OURS) == 0
    assert checkpoint_faults.wrong(results, checkpoint_faults.THEIRS) > 10  # every fault has fired
