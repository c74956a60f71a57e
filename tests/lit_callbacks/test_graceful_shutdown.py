"""Stopped by a signal anywhere, a run is saved, ends with an honest code, and goes on as if nothing had happened."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from helpers import MemoryLogger, TinyLM, Tokens, loader, make_trainer, says
from lit_callbacks import ExactResume, GracefulExit, GracefulShutdown, SetupError, VerifiedCheckpoint

ROOT = Path(__file__).parents[2]


class Send(Callback):
    """Send this process a real signal in the `n`-th call of a hook."""

    def __init__(self, hook, n, *numbers):
        self.left, self.numbers = n, numbers or (signal.SIGTERM,)
        setattr(self, hook, self._count)

    def _count(self, trainer, *_):
        self.left -= 1
        if self.left == 0:
            for number in self.numbers:
                signal.raise_signal(number)


class LM(TinyLM):
    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss


def fit(folder, *callbacks, shutdown=None, resume=None, every=100, accumulate=1, workers=0, **options):
    torch.manual_seed(0)
    logger = MemoryLogger()
    trainer = make_trainer(
        default_root_dir=folder,
        enable_checkpointing=True,
        accumulate_grad_batches=accumulate,
        logger=logger,
        callbacks=[
            shutdown or GracefulShutdown(),
            ExactResume(),
            *callbacks,
            VerifiedCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=every),
        ],
        **{"max_epochs": 2, "val_check_interval": 7, "num_sanity_val_steps": 0, **options},
    )
    module = LM(dropout=0.1)
    stopped = None
    try:
        train = DataLoader(Tokens(60), 4, shuffle=True, num_workers=workers)
        trainer.fit(module, train, loader(n_samples=12), ckpt_path=resume)
    except SystemExit as error:
        stopped = error
    rows = [(step, key, value) for step, values in logger.calls for key, value in values.items()]
    return module, trainer, rows, stopped


@pytest.mark.parametrize(
    ("hook", "n", "accumulate", "workers"),
    [
        ("on_train_batch_start", 4, 1, 0),
        ("on_train_batch_start", 4, 1, 2),
        ("on_after_backward", 10, 1, 0),
        ("on_train_batch_start", 7, 1, 0),  # in front of a validation
        ("on_train_batch_start", 15, 1, 0),  # the last batch of an epoch
        ("on_train_batch_start", 16, 1, 0),  # the first of the next
        ("on_train_batch_start", 5, 4, 0),  # in the middle of an accumulation window
        ("on_validation_batch_start", 2, 1, 0),
        ("on_validation_batch_start", 2, 4, 0),  # a validation in the middle of a window
        ("on_validation_end", 2, 1, 0),
        ("on_train_epoch_end", 1, 1, 0),
        ("on_save_checkpoint", 3, 1, 0),  # the first two are the rehearsal's and an earlier step's
    ],
)
def test_stopped_and_resumed_it_equals_the_undisturbed_run(tmp_path, hook, n, accumulate, workers):
    every = 5 if hook == "on_save_checkpoint" else 100
    expected, _, rows, _ = fit(tmp_path / "a", accumulate=accumulate, every=every)
    send = Send(hook, n)
    _, stopped_trainer, first, stopped = fit(tmp_path / "b", send, accumulate=accumulate, workers=workers, every=every)
    assert send.left <= 0
    assert isinstance(stopped, GracefulExit)
    assert (stopped.code, stopped.reason, stopped.step) == (143, "SIGTERM", stopped_trainer.global_step)
    assert json.loads((tmp_path / "b/stopped.json").read_text()) == {
        "reason": "SIGTERM", "step": stopped.step, "exit_code": 143, "checkpoint": stopped.checkpoint
    }  # fmt: skip
    assert not (tmp_path / "b/finished.json").exists()
    actual, _, rest, ended = fit(tmp_path / "b", resume="last", accumulate=accumulate, workers=workers, every=every)
    assert ended is None
    assert len(rest) < len(rows)
    assert sorted(set(first + rest)) == sorted(set(rows))
    assert all(torch.equal(actual.state_dict()[name], value) for name, value in expected.state_dict().items())
    assert (tmp_path / "b/finished.json").exists()
    assert not (tmp_path / "b/stopped.json").exists()


def test_in_a_sanity_check_there_is_nothing_to_save(tmp_path):
    *_, stopped = fit(tmp_path, Send("on_validation_batch_start", 1), num_sanity_val_steps=2)
    assert (stopped.code, stopped.checkpoint) == (143, None)
    assert list((tmp_path / "checkpoints").glob("*.ckpt")) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_each_signal_has_its_code(tmp_path, number, code):
    *_, stopped = fit(tmp_path, Send("on_train_batch_start", 3, number))
    assert (stopped.code, stopped.reason) == (code, number.name)
    assert Path(stopped.checkpoint).exists()


def test_a_run_that_has_made_its_last_step_is_finished(tmp_path):
    *_, stopped = fit(tmp_path, Send("on_after_backward", 7), max_steps=7, max_epochs=-1)
    assert stopped is None
    assert (tmp_path / "finished.json").exists()


def test_a_run_that_something_else_has_stopped_is_finished(tmp_path):
    class Enough(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 5

    *_, stopped = fit(tmp_path, Send("on_after_backward", 5), Enough())
    assert stopped is None
    assert (tmp_path / "finished.json").exists()


def test_a_save_may_take_longer_than_the_grace(tmp_path, monkeypatch):
    save = VerifiedCheckpoint.save_now
    monkeypatch.setattr(VerifiedCheckpoint, "save_now", lambda *args: (time.sleep(1.5), save(*args))[1])
    *_, stopped = fit(tmp_path, Send("on_train_batch_start", 3), shutdown=GracefulShutdown(grace_seconds=0.5))
    assert Path(stopped.checkpoint).exists()  # and this process is still there


def test_processes_that_are_started_meanwhile_can_be_terminated(tmp_path):
    codes = []

    class Start(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2 and not codes:
                child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
                child.start()
                time.sleep(0.2)
                child.terminate()
                child.join(10)
                codes.append(child.exitcode)

    fit(tmp_path, Start(), max_steps=4, max_epochs=-1)
    assert codes == [-signal.SIGTERM]


def test_a_folder_that_cannot_be_written_does_not_hide_the_exit(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_callbacks.graceful_shutdown.STOPPED", "missing/stopped.json")
    with says("stopped, but not all could be written down"):
        *_, stopped = fit(tmp_path, Send("on_train_batch_start", 3))
    assert (stopped.code, Path(stopped.checkpoint).exists()) == (143, True)


def test_the_time_limit(tmp_path):
    class Slow(Callback):
        def on_train_batch_start(self, *_):
            time.sleep(0.02)

    *_, stopped = fit(tmp_path, Slow(), shutdown=GracefulShutdown(time_limit=0.1))
    assert (stopped.code, stopped.reason) == (143, "time limit")
    assert 1 <= stopped.step < 30


def test_a_second_ctrl_c_stops_at_once_and_lightning_says_how(tmp_path):
    with says("Stopping after this step; press Ctrl-C again"):
        _, trainer, _, stopped = fit(tmp_path, Send("on_train_batch_start", 3, signal.SIGINT, signal.SIGINT))
    assert not isinstance(stopped, GracefulExit)
    assert trainer.interrupted
    assert trainer.global_step == 2


def test_a_second_sigterm_stops_at_once(tmp_path):
    _, trainer, _, stopped = fit(tmp_path, Send("on_train_batch_start", 3, signal.SIGTERM, signal.SIGTERM))
    assert not isinstance(stopped, GracefulExit)
    assert (stopped.code, trainer.global_step) == (143, 2)


def test_signals_belong_to_their_owners_again(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    fit(tmp_path / "a")
    fit(tmp_path / "b", Send("on_train_batch_start", 3))
    assert [signal.getsignal(number) for number in numbers] == before
    previous = signal.set_wakeup_fd(-1)
    assert previous == -1


def test_a_wakeup_fd_of_others_is_left_to_them(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    try:
        *_, stopped = fit(tmp_path, Send("on_train_batch_start", 3))
        assert isinstance(stopped, GracefulExit)
        assert signal.set_wakeup_fd(-1) == writer
    finally:
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


def test_without_anything_to_save_with_it_is_refused():
    trainer = make_trainer(max_steps=1, callbacks=[GracefulShutdown()])
    with pytest.raises(SetupError, match="add VerifiedCheckpoint"):
        trainer.fit(TinyLM(), loader())


@pytest.mark.parametrize("options", [{"time_limit": 0}, {"grace_seconds": 0}, {"grace_seconds": float("inf")}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GracefulShutdown(**options)


def test_it_can_be_pickled():
    assert pickle.loads(pickle.dumps(GracefulShutdown(time_limit=5.0))).time_limit == 5.0


@pytest.mark.parametrize(("code", "number"), [(0, signal.SIGUSR1), (1, signal.SIGUSR1), (0, signal.SIGUSR2)])
def test_a_slurm_job_is_queued_again_and_goes_on_by_itself(tmp_path, monkeypatch, code, number):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    facts = {"JOB_ID": "12", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    for name, value in facts.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    plugins = [SLURMEnvironment(auto_requeue=True, requeue_signal=number)]
    with says("SLURM job 12 is queued again" if code == 0 else "scontrol ended with 1. Submit it again"):
        *_, stopped = fit(tmp_path, Send("on_train_batch_start", 5, number), plugins=plugins, devices=1)
    assert (stopped.code, stopped.step) == (143, 5)
    assert (tmp_path / "called").read_text() == "requeue 12\n"
    _, trainer, rows, _ = fit(tmp_path, plugins=plugins, devices=1)  # without ckpt_path, as Lightning has it
    assert min(step for step, key, _ in rows if key == "train/loss_step") >= 4
    assert trainer.global_step == 30


SCRIPT = """
import hashlib, sys, time
sys.path[:0] = [{callbacks!r}, {tests!r}]
from helpers import *
from lightning.pytorch import Callback
from lit_callbacks import GracefulShutdown, VerifiedCheckpoint

class Here(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            print("READY", flush=True)
            {hang}

torch.set_num_threads(1)
trainer = make_trainer(max_steps=10**6, enable_checkpointing=True, default_root_dir={folder!r},
    callbacks=[GracefulShutdown(None, {grace}), Here(), VerifiedCheckpoint({folder!r}, every_n_train_steps=10**5)])
train = torch.utils.data.DataLoader(Tokens(4000), 4, num_workers={workers})
trainer.fit(TinyLM(), train)
"""


def run(tmp_path, hang, *numbers, grace=60.0, workers=0):
    places = {"callbacks": str(ROOT / "callbacks"), "tests": str(ROOT / "tests"), "folder": str(tmp_path)}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(hang=hang, grace=grace, workers=workers, **places))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        start_new_session=True,
    )  # fmt: skip
    assert any("READY" in line for line in process.stdout)
    for number in numbers:
        os.killpg(process.pid, number)  # as a terminal and torchrun do: the loader's workers get it, too
        time.sleep(0.3)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def test_the_process_ends_with_the_code_and_a_checkpoint(tmp_path):
    code, error = run(tmp_path, "time.sleep(1)", signal.SIGTERM)
    assert code == 143, error
    assert json.loads((tmp_path / "stopped.json").read_text())["checkpoint"] is not None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_does_not_cost_the_run_its_workers(tmp_path, number, code):
    found, error = run(tmp_path, "time.sleep(1)", number, workers=2)
    assert found == code, error
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert (stopped["step"], Path(stopped["checkpoint"]).exists()) == (4, True)


@pytest.mark.parametrize(("numbers", "grace"), [((signal.SIGTERM,), 0.5), ((signal.SIGTERM, signal.SIGTERM), 60.0)])
def test_a_batch_that_hangs_in_c_does_not_keep_the_process_alive(tmp_path, numbers, grace):
    hang = "hashlib.pbkdf2_hmac('sha256', b'password', b'salt', 10**9)"  # minutes, in one call
    code, error = run(tmp_path, hang, *numbers, grace=grace)
    assert code == 143
    assert "in on_train_batch_start" in error  # the stacks
