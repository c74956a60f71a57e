"""Events are those of one run, in its own folder."""

import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from helpers import MemoryLogger, TinyLM, loader
from lit_callbacks import ExactResume, GradientNormLogger, LossSpikeRecovery, VerifiedCheckpoint
from lit_callbacks.health import without_undone


class WandbLogger(MemoryLogger):
    """Like Lightning's: of its name, and without a folder for each run."""


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_in_the_folder_of_another_begins_anew(make_trainer, tmp_path):
    path = tmp_path / "events.jsonl"
    for number in range(2):
        make_trainer(max_steps=2, callbacks=[GradientNormLogger(), LossSpikeRecovery()]).fit(TinyLM(), loader())
        with path.open("a") as file:
            file.write(json.dumps({"step": 1, "event": "alarm", "where": [number]}) + "\n")
    assert [event["event"] for event in events(path)] == ["alarm", "begin", "alarm"]
    assert [event["where"] for event in without_undone(events(path))] == [[1]]


def test_a_trial_of_one_batch_is_no_run(make_trainer, tmp_path):
    (tmp_path / "events.jsonl").write_text('{"step": 1, "event": "alarm"}\n')
    make_trainer(fast_dev_run=True, callbacks=[GradientNormLogger(1)]).fit(TinyLM(), loader())
    assert [event["event"] for event in events(tmp_path / "events.jsonl")] == ["alarm"]


def test_a_run_that_goes_on_does_not(make_trainer, tmp_path):
    path, options = tmp_path / "events.jsonl", {"enable_checkpointing": True}
    for steps, resumed in ((2, None), (4, "last")):
        saving = VerifiedCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1)
        make_trainer(max_steps=steps, callbacks=[saving, ExactResume()], **options).fit(
            TinyLM(), loader(), ckpt_path=resumed
        )
        path.write_text((path.read_text() if path.exists() else "") + '{"step": 1, "event": "alarm"}\n')
    assert not [event for event in events(path) if event["event"] == "begin"]


@pytest.mark.parametrize("first", [True, False])
def test_events_are_beside_the_metrics_wherever_that_logger_stands(first, make_trainer, tmp_path):
    loggers = [CSVLogger(tmp_path, name="mine"), WandbLogger()]
    run = make_trainer(max_steps=1, callbacks=[GradientNormLogger(1)], logger=loggers if first else loggers[::-1])
    observer = run.callbacks[0]
    run.fit(TinyLM(), loader())
    observer.events.write(step=0, event="alarm")
    assert [path.parent for path in tmp_path.rglob("events.jsonl")] == [Path(loggers[0].log_dir)]
    assert (Path(loggers[0].log_dir) / "metrics.csv").exists()
