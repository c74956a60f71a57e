"""A file that tells how far the run is, and stacks when nothing moves."""

import ctypes
import json
import time

import pytest
from lightning.pytorch import Callback

from helpers import TinyLM, loader, says
from lit_callbacks import Heartbeat
from lit_callbacks.markers import last_beat


class Pause(Callback):
    """Do something slow in one step, as `slow_hook`."""

    def __init__(self, slow, at=12):
        self.slow, self.at, self.fired = slow, at, False

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.at and not self.fired:
            self.fired = True
            self.slow_hook()

    def slow_hook(self):
        self.slow()


def fit(make_trainer, heartbeat, *callbacks, **options):
    trainer = make_trainer(callbacks=[heartbeat, *callbacks], **{"max_steps": 16, **options})
    trainer.fit(TinyLM(), loader(), loader(n_samples=8))
    return trainer


def test_the_file_says_how_far_the_run_is(make_trainer, tmp_path):
    fit(make_trainer, Heartbeat())
    facts = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (facts["step"], facts["stage"]) == (16, "end")
    assert abs(facts["time"] - time.time()) < 60
    assert 0 < facts["step_seconds"]["p50"] <= facts["step_seconds"]["p95"] <= facts["step_seconds"]["max"]
    assert last_beat(tmp_path) == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heartbeat.json"]


def test_step_times_are_those_of_steps_and_their_percentiles_are_right(make_trainer, tmp_path):
    heartbeat = Heartbeat()
    fit(make_trainer, heartbeat, accumulate_grad_batches=4, max_steps=4)
    assert len(heartbeat._times) == 4
    heartbeat._path = tmp_path / "heartbeat.json"
    heartbeat._times.extend(float(i) for i in range(1, 101))  # 100 are remembered
    heartbeat._write(make_trainer(), "train")
    assert json.loads(heartbeat._path.read_text())["step_seconds"] == {"p50": 51.0, "p95": 96.0, "max": 100.0}


def test_a_reader_sees_every_stage_and_never_half_a_file(make_trainer, tmp_path):
    class Look(Callback):
        def __init__(self):
            self.stages = set()

        def on_train_batch_start(self, *_):
            self.stages.add(json.loads((tmp_path / "heartbeat.json").read_text())["stage"])

        on_validation_batch_start = on_train_batch_start

    look = Look()
    fit(make_trainer, Heartbeat(every_seconds=1e-9), look, val_check_interval=4, num_sanity_val_steps=0)
    assert look.stages == {"train", "validate"}


@pytest.mark.parametrize("slow", [lambda: time.sleep(1.2), lambda: ctypes.PyDLL(None).usleep(990_000)])
def test_when_nothing_moves_the_stacks_name_the_place(make_trainer, tmp_path, slow):
    pause = Pause(slow)  # the second one holds Python's lock
    with says(r"step 13: nothing had moved for 1 s; the stacks are in .*stacks.txt"):
        fit(make_trainer, Heartbeat(hang_seconds=0.5), pause)
    assert pause.fired
    assert "in slow_hook" in (tmp_path / "stacks.txt").read_text()
    *_, event = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"]) == ("hang", 13)
    assert event["seconds"] >= 0.5


def test_nothing_is_left_armed_after_an_exception(make_trainer, tmp_path):
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(make_trainer, Heartbeat(hang_seconds=0.2), Pause(fail))
    time.sleep(0.4)
    assert not (tmp_path / "stacks.txt").exists()
    assert last_beat(tmp_path) <= 12


def test_a_folder_that_cannot_be_written_does_not_matter(make_trainer, tmp_path):
    (tmp_path / "file").touch()
    assert fit(make_trainer, Heartbeat(), default_root_dir=tmp_path / "file" / "run").global_step == 16


def test_a_missing_or_torn_heartbeat_is_step_zero(tmp_path):
    assert last_beat(tmp_path) == 0
    (tmp_path / "heartbeat.json").write_text('{"step": 1')
    assert last_beat(tmp_path) == 0
