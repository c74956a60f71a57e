"""Under FSDP2 two processes do what one does: Hugging Face's models, callbacks, schedule-free optimizers, texts."""

from pathlib import Path

import pytest

from helpers import two_ranks
from sharded_tasks_worker import CASES, fit


def test_two_ranks_do_what_one_process_does(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i * i % 97:03d}, {i:04d}; " for i in range(4000)))
    single = {case: fit(case, tmp_path / "single" / case, str(text), "single") for case in CASES}
    plain = str(tmp_path / "single" / "hugging_face" / "step=6.ckpt")
    first, second = two_ranks(Path(__file__).with_name("sharded_tasks_worker.py"), tmp_path, "fsdp2", text, plain)
    for name, alone in single.items():
        together = first[name]
        losses = {step: (loss + second[name]["losses"][step]) / 2 for step, loss in together["losses"].items()}
        assert losses == pytest.approx(alone["losses"], rel=1e-4), name
        assert together["weights"] == pytest.approx(alone["weights"], rel=1e-4), name
        assert together["validation"] == pytest.approx(alone["validation"], rel=1e-3), name
        assert together["step"] == alone["step"]
        assert second[name]["weights"] == together["weights"]
    assert single["early_stopping"]["step"] < 12  # it has stopped, and gone back
    assert single["texts"]["validation"]["val/chrf"] > 0
    for case in ("hugging_face", "unfreezing"):
        assert first[f"{case} resumed"]["weights"] == first[case]["weights"], case
    # Between two sets of weights there is a rounding error.
    rounded = first["schedule_free resumed"], first["plain resumed"]
    for resumed, whole in zip(rounded, (first["schedule_free"], first["hugging_face"]), strict=True):
        assert resumed["weights"] == pytest.approx(whole["weights"], rel=1e-4)
        assert resumed["losses"] == pytest.approx({s: v for s, v in whole["losses"].items() if int(s) >= 6}, rel=1e-4)
