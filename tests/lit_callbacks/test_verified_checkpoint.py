"""At every moment there is a checkpoint to go on from, and never a bad one: real fits, with real faults."""

import enum
import pickle
import re
import shutil
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

import lit_callbacks.checkpointing.atomic_checkpoint_io as atomic
from helpers import MemoryLogger, OldTinyLM, TinyLM, TwoOptimizers, loader, make_trainer, says
from lit_callbacks import CheckpointError, ExactResume, LossSpikeRecovery, SetupError, VerifiedCheckpoint
from lit_callbacks.checkpointing import BackgroundCheckpointIO, _writer, committed, load_verified, newest_checkpoint
from lit_callbacks.checkpointing.manifest import manifest_path
from lit_callbacks.checkpointing.shelf import link_last


def fit(folder, *callbacks, steps=12, resume=None, module=None, every=5, checkpoint=None, options=None, **trainer):
    torch.manual_seed(0)
    options = {"every_n_train_steps": every, **(options or {})}
    checkpoint = checkpoint or VerifiedCheckpoint(folder / "ck", "{step}", **options)
    trainer = make_trainer(
        enable_checkpointing=True,
        default_root_dir=folder,
        callbacks=[*callbacks, ExactResume(), checkpoint],
        **{"max_steps": steps, "limit_val_batches": 0, **trainer},
    )
    module = module or TinyLM()
    trainer.fit(module, loader(n_samples=400), loader(n_samples=8), ckpt_path=resume)
    return trainer, module, checkpoint


def names(folder):
    return sorted(path.name for path in (folder / "ck").iterdir() if path.suffix == ".ckpt")


class At(Callback):
    """Do something after a step."""

    def __init__(self, step, act):
        self.step, self.act, self.fired = step, act, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.fired = True
            self.act(trainer, pl_module)


class Anomaly(Callback):
    """Is in the middle of an anomaly between two steps."""

    def __init__(self, start, end):
        self.range, self.step = range(start, end), 0

    def has_open_anomaly(self):
        return self.step in self.range

    def on_train_batch_end(self, trainer, *_):
        self.step = trainer.global_step


def test_what_is_there_after_a_run(tmp_path):
    _, module, checkpoint = fit(tmp_path)
    assert names(tmp_path) == ["last.ckpt", "step=10.ckpt", "step=12.ckpt"]
    assert (tmp_path / "ck" / "last.ckpt").readlink() == Path("step=12.ckpt")
    assert checkpoint.best_model_path == str(tmp_path / "ck" / "step=12.ckpt")
    assert (tmp_path / "finished.json").read_text() == '{"step": 12}\n'
    kept = {path.name: manifest for path, manifest in committed(tmp_path / "ck")}
    manifest = kept["step=12.ckpt"]
    assert (manifest.step, manifest.epoch, manifest.attempt, manifest.suspect) == (12, 0, 1, None)
    assert manifest.environment["torch"] == str(torch.__version__)
    assert manifest.environment["world_size"] == 1
    loaded = load_verified(tmp_path / "ck" / "last.ckpt")
    assert all(torch.equal(loaded["state_dict"][name], value) for name, value in module.state_dict().items())
    assert not list((tmp_path / "ck").glob(".*"))


@pytest.mark.parametrize(("top_k", "expected"), [(1, [12]), (3, [5, 10, 12]), (-1, [5, 10, 12])])
def test_how_many_are_kept(tmp_path, top_k, expected):
    fit(tmp_path, options={"save_top_k": top_k})
    assert sorted(manifest.step for _, manifest in committed(tmp_path / "ck")) == expected


def test_the_best_by_a_metric_beside_the_newest(tmp_path):
    best = VerifiedCheckpoint(tmp_path / "ck", "best-{step}", monitor="val/loss", save_top_k=1)
    losses = MemoryLogger()
    trainer, *_ = fit(tmp_path, best, val_check_interval=4, limit_val_batches=1.0, logger=losses)
    by_step = {step + 1: value for step, value in losses.values("val/loss").items()}
    lowest = min(by_step, key=by_step.get)
    assert Path(best.best_model_path).name == f"best-step={lowest}.ckpt"
    assert float(best.best_model_score) == pytest.approx(by_step[lowest])
    assert [n for n in names(tmp_path) if n.startswith("best")] == [f"best-step={lowest}.ckpt"]
    (found,) = trainer.validate(TinyLM(), loader(n_samples=8), ckpt_path=best.best_model_path, verbose=False)
    assert found["val/loss"] == pytest.approx(by_step[lowest])


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    def poison(trainer, module):
        module.head.weight.data[0, 0] = torch.nan

    poisoned = At(7, poison)
    with says("no checkpoint is saved: not finite: .*The last good checkpoint stands"):
        fit(tmp_path, poisoned)
    assert poisoned.fired
    assert names(tmp_path) == ["last.ckpt", "step=5.ckpt"]
    assert all(v.isfinite().all() for v in load_verified(tmp_path / "ck" / "last.ckpt")["state_dict"].values())


def test_an_optimizer_state_that_is_not_finite_is_not_saved_either(tmp_path):
    class Poison(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 10:
                trainer.optimizers[0].state[pl_module.head.weight]["exp_avg"][0, 0] = torch.inf

    with says("not finite: optimizer 0"):
        fit(tmp_path, Poison(), steps=10)
    assert names(tmp_path) == ["last.ckpt", "step=5.ckpt"]


def test_values_that_were_infinite_from_the_start_are_no_reason(tmp_path):
    class Masked(TinyLM):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((2,), -torch.inf))

    fit(tmp_path, module=Masked())
    fit(tmp_path, module=Masked(), steps=17, resume="last")
    assert "step=17.ckpt" in names(tmp_path)


def test_nothing_is_saved_in_an_anomaly_and_it_is_made_up_for(tmp_path):
    with says("no checkpoint is saved: Anomaly is in the middle of an anomaly") as lines:
        fit(tmp_path, Anomaly(4, 8))
    assert len(lines) == 1
    assert names(tmp_path) == ["last.ckpt", "step=10.ckpt", "step=12.ckpt"]
    fit(tmp_path / "b", Anomaly(4, 8), steps=9)
    assert names(tmp_path / "b") == ["last.ckpt", "step=8.ckpt", "step=9.ckpt"]


def test_a_run_that_ends_in_an_anomaly_leaves_a_suspect(tmp_path):
    fit(tmp_path, Anomaly(11, 20))
    assert names(tmp_path) == ["last.ckpt", "step=10.ckpt", "step=5.ckpt", "suspect-step=12.ckpt"]
    assert (tmp_path / "ck" / "last.ckpt").readlink() == Path("step=10.ckpt")
    point = newest_checkpoint([tmp_path / "ck"])
    assert (point.manifest.step, point.steps_lost) == (10, 2)
    assert "Anomaly was in the middle of an anomaly" in point.describe()
    fit(tmp_path, steps=16, resume="last")
    assert names(tmp_path) == ["last.ckpt", "step=10.ckpt", "step=15.ckpt", "step=16.ckpt"]


def test_loss_spike_recovery_vetoes_while_an_episode_is_open(tmp_path):
    torch.manual_seed(0)
    recovery = LossSpikeRecovery()
    checkpoint = VerifiedCheckpoint(tmp_path / "ck", "{step}", every_n_train_steps=20, save_top_k=-1)
    trainer = make_trainer(
        enable_checkpointing=True, max_steps=60, default_root_dir=tmp_path, callbacks=[recovery, checkpoint]
    )
    bad = {4 * 39 + i: "nan" for i in range(4)}
    with says("no checkpoint is saved: LossSpikeRecovery is in the middle"):
        trainer.fit(TinyLM(), loader(bad, n_samples=400))
    steps = [manifest.step for _, manifest in committed(tmp_path / "ck")]
    assert 40 not in steps
    assert any(40 < step <= 43 for step in steps)


def test_a_metric_that_is_not_a_number_is_not_the_best(tmp_path):
    class Broken(TinyLM):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(torch.nan if self.global_step > 4 else 3.0))

    best = VerifiedCheckpoint(tmp_path / "ck", "best-{step}", monitor="val/loss")
    with says("val/loss is nan"):
        fit(tmp_path, best, module=Broken(), val_check_interval=4, limit_val_batches=1.0)
    assert Path(best.best_model_path).name == "best-step=4.ckpt"


def test_a_metric_that_nobody_logs_is_named(tmp_path):
    wrong = VerifiedCheckpoint(tmp_path / "ck", monitor="val/los")
    with pytest.raises(SetupError, match=r"monitor='val/los'\) found no such metric.*val/loss"):
        fit(tmp_path, wrong, val_check_interval=4, limit_val_batches=1.0)


class Color(enum.Enum):
    RED = 1


@dataclass
class Settings:
    width: int = 3


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Path("data"), "pathlib.PosixPath"),
        (Color.RED, "Color"),
        (Settings(), "Settings"),
        ({"inner": [1, deque([2])]}, "collections.deque"),
    ],
)
def test_what_could_not_be_loaded_does_not_start(tmp_path, value, kind):
    class Holder(TinyLM):
        def __init__(self, value):
            super().__init__()
            self.save_hyperparameters()

    with pytest.raises(SetupError, match=rf"hyper_parameters\.value.* is a .*{kind}.*Keep plain data"):
        fit(tmp_path, module=Holder(value))
    assert names(tmp_path) == []
    assert not list((tmp_path / "ck").glob(".*"))


def test_a_callbacks_state_that_cannot_be_loaded_is_named(tmp_path):
    class Keeper(Callback):
        def state_dict(self):
            return {"recent": deque([1.0])}

    with pytest.raises(SetupError, match=r"Keeper\.recent is a collections\.deque"):
        fit(tmp_path, Keeper())


def test_what_cannot_be_pickled_is_said(tmp_path):
    class Keeper(Callback):
        def state_dict(self):
            return {"function": lambda: None}

    with pytest.raises(SetupError, match=r"cannot be written: .*Keeper\.function is a builtins\.function"):
        fit(tmp_path, Keeper())


def fail_at(monkeypatch, *calls):
    """Let some of the writes fail as on a full disk; call 0 is the rehearsal, which writes by itself."""
    save, seen = torch.save, []

    def sometimes(obj, file, *args, **kwargs):
        if "rehearsal" not in file.path.name:
            seen.append(file.path)
            if len(seen) in calls:
                file.write(b"half")
                raise OSError(28, "No space left on device")
        return save(obj, file, *args, **kwargs)

    monkeypatch.setattr(atomic.torch, "save", sometimes)
    return seen


def test_a_save_that_fails_keeps_the_older_ones_and_training(tmp_path, monkeypatch):
    seen = fail_at(monkeypatch, 2)
    with says(r"step 10: the checkpoint could not be saved: OSError.*No space left.*Last one: .*step=5.ckpt"):
        trainer, *_ = fit(tmp_path, steps=17)
    assert len(seen) == 4
    assert trainer.global_step == 17
    assert names(tmp_path) == ["last.ckpt", "step=15.ckpt", "step=17.ckpt"]
    assert not list((tmp_path / "ck").glob(".*"))


def test_after_so_many_in_a_row_training_stops_with_the_last_good_one_intact(tmp_path, monkeypatch):
    fail_at(monkeypatch, 2, 3, 4)
    with pytest.raises(CheckpointError, match=r"Last one: .*step=5.ckpt\. Stopped after 3 saves in a row"):
        fit(tmp_path, steps=40)
    assert newest_checkpoint([tmp_path / "ck"]).manifest.step == 5


def test_a_run_whose_last_save_fails_has_not_finished(tmp_path, monkeypatch):
    fail_at(monkeypatch, 3, 4)  # at the last step, and once more when training ends
    with pytest.raises(CheckpointError, match=r"its last step, 12, but.*go on from .*step=10.ckpt"):
        fit(tmp_path)
    assert not (tmp_path / "finished.json").exists()
    monkeypatch.undo()
    fit(tmp_path, resume="last")
    assert newest_checkpoint([tmp_path / "ck"]).manifest.step == 12
    assert (tmp_path / "finished.json").exists()


def test_a_disk_without_room_is_not_filled_up(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    free = iter([usage.free, 1000, usage.free, usage.free])
    monkeypatch.setattr(_writer.shutil, "disk_usage", lambda _: usage._replace(free=next(free)))
    with says("MiB free in .*, and a checkpoint takes"):
        fit(tmp_path, steps=15)
    assert names(tmp_path) == ["last.ckpt", "step=15.ckpt", "step=5.ckpt"]


def test_going_back_on_purpose_overwrites_nothing_and_is_the_newest_from_then_on(tmp_path):
    fit(tmp_path, steps=20, options={"save_top_k": -1})
    fit(tmp_path, steps=12, resume=str(tmp_path / "ck" / "step=10.ckpt"), options={"save_top_k": -1})
    assert names(tmp_path) == [
        "last.ckpt",
        "step=10.ckpt",
        "step=12.ckpt",
        "step=15.ckpt",
        "step=20.ckpt",
        "step=5.ckpt",
    ]
    assert newest_checkpoint([tmp_path / "ck"]).manifest.step == 12
    fit(tmp_path, steps=16, resume="last", options={"save_top_k": -1})
    assert "step=15-v1.ckpt" in names(tmp_path)
    assert "step=15.ckpt" not in names(tmp_path)  # this run has come as far
    assert "step=20.ckpt" in names(tmp_path)  # and not so far


def test_a_moved_run_still_knows_its_checkpoints(tmp_path):
    fit(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    _, _, checkpoint = fit(tmp_path / "b", steps=20, resume="last")
    assert names(tmp_path / "b") == ["last.ckpt", "step=12.ckpt", "step=15.ckpt", "step=20.ckpt"]  # 12 was resumed from
    assert Path(checkpoint.best_model_path).parent == tmp_path / "b" / "ck"


def test_orphans_of_an_earlier_attempt_go(tmp_path):
    fit(tmp_path)
    for kept in committed(tmp_path / "ck"):
        if kept.manifest.step == 10:
            for suffix in ("", "-v7"):
                copy = kept.path.with_name(f"step=9{suffix}.ckpt")
                shutil.copy(kept.path, copy)
                shutil.copy(manifest_path(kept.path), manifest_path(copy))
    fit(tmp_path, steps=20, resume="last")
    assert names(tmp_path) == ["last.ckpt", "step=12.ckpt", "step=15.ckpt", "step=20.ckpt"]


def test_an_explicit_path_is_verified_and_never_replaced(tmp_path):
    fit(tmp_path)
    path = tmp_path / "ck" / "step=12.ckpt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step=12.ckpt is not what was saved: its contents have changed"):
        fit(tmp_path, steps=20, resume=str(path))
    with says("Going on from step 10.*Passed over: step=12.ckpt.*2 steps are lost"):
        trainer, *_ = fit(tmp_path, steps=20, resume="last")
    assert trainer.global_step == 20
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        fit(tmp_path, resume=str(tmp_path / "nowhere.ckpt"))


def test_last_without_any_checkpoint_begins_anew_and_with_only_bad_ones_does_not(tmp_path):
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        fit(tmp_path, resume="last")
    for path, _ in committed(tmp_path / "ck"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of them can be trusted"):
        fit(tmp_path, steps=20, resume="last")


def test_a_regular_last_file_of_others_is_left_alone(tmp_path):
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "last.ckpt").write_text("somebody's")
    fit(tmp_path)
    assert (tmp_path / "ck" / "last.ckpt").read_text() == "somebody's"


class Slow(atomic.AtomicCheckpointIO):
    """Fails in the background."""

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if "step=10" in str(path):
            raise OSError(28, "No space left on device")
        super().save_checkpoint(checkpoint, path, storage_options)


class BackgroundThatFails(BackgroundCheckpointIO):
    """At one step."""

    def _write(self, checkpoint, path, storage_options):
        if "step=10" in str(path):
            raise OSError(28, "No space left on device")
        super()._write(checkpoint, path, storage_options)


def test_a_save_in_the_background(tmp_path):
    fit(tmp_path, plugins=[AsyncCheckpointIO()])
    assert names(tmp_path) == ["last.ckpt", "step=10.ckpt", "step=12.ckpt"]
    assert newest_checkpoint([tmp_path / "ck"]).manifest.step == 12


def test_a_failure_in_the_background_is_noticed_and_deletes_nothing(tmp_path):
    with says("could not be saved: OSError.*No space left"):
        fit(tmp_path, steps=17, plugins=[AsyncCheckpointIO(Slow())])
    assert "step=10.ckpt" not in names(tmp_path)
    assert newest_checkpoint([tmp_path / "ck"]).manifest.step in (15, 17)


@pytest.mark.parametrize("io", [lambda: AsyncCheckpointIO(Slow()), BackgroundThatFails], ids=["async", "background"])
def test_a_best_one_that_was_never_written_is_not_the_best(tmp_path, io):
    class Losses(TinyLM):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor({5: 3.0, 10: 1.0}.get(self.global_step, 2.5)))
            time.sleep(0.1)

    best = VerifiedCheckpoint(tmp_path / "ck", "{step}", monitor="val/loss", save_top_k=1)
    options = {"val_check_interval": 5, "limit_val_batches": 1.0, "plugins": [io()]}
    with says("could not be saved: .*No space left"):
        fit(tmp_path, checkpoint=best, module=Losses(), steps=17, **options)
    assert Path(best.best_model_path).name == "step=15.ckpt"
    assert Path(best.best_model_path).exists()


def test_what_waits_in_the_background_is_written_although_training_ends_with_an_error(tmp_path, monkeypatch):
    save = torch.save
    monkeypatch.setattr(atomic.torch, "save", lambda *args, **options: (time.sleep(0.3), save(*args, **options)))

    def fail(trainer, module):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, At(11, fail), plugins=[AsyncCheckpointIO()])
    assert newest_checkpoint([tmp_path / "ck"]).manifest.step == 10


def test_two_with_one_name_do_not_overwrite_each_other_in_the_background(tmp_path):
    best = VerifiedCheckpoint(tmp_path / "ck", "{step}", monitor="val/loss", save_top_k=-1)
    options = {"val_check_interval": 5, "limit_val_batches": 1.0, "plugins": [BackgroundCheckpointIO()]}
    fit(tmp_path, best, options={"save_top_k": -1}, **options)
    assert sorted(kept.manifest.step for kept in committed(tmp_path / "ck")) == [5, 5, 10, 10, 12]


def test_a_damaged_file_is_not_evaluated_either(tmp_path):
    trainer, module, _ = fit(tmp_path)
    path = tmp_path / "ck" / "step=12.ckpt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    for evaluate in (trainer.validate, trainer.test):
        with pytest.raises(CheckpointError, match="is not what was saved"):
            evaluate(module, loader(n_samples=8), ckpt_path="best", verbose=False)


def test_metrics_with_a_slash_make_no_folders(tmp_path):
    best = VerifiedCheckpoint(tmp_path / "ck", "best-{step}-{val/loss:.1f}", monitor="val/loss", save_top_k=1)
    fit(tmp_path, checkpoint=best, val_check_interval=4, limit_val_batches=1.0)
    (name,) = [name for name in names(tmp_path) if name != "last.ckpt"]
    assert re.fullmatch(r"best-step=\d+-val-loss=\d\.\d\.ckpt", name)
    assert newest_checkpoint([tmp_path / "ck"]).path.name == name


@pytest.mark.parametrize("kind", ["complex", "frozen"])
def test_no_parameter_is_overlooked(tmp_path, kind):
    class More(TinyLM):
        def __init__(self):
            super().__init__()
            self.complex = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
            self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
            self.register_buffer("float8", torch.ones(3).to(torch.float8_e4m3fn))

    def poison(trainer, module):
        getattr(module, kind).data[0] = torch.nan

    with says(f"not finite: .*{kind}"):
        fit(tmp_path, At(7, poison), module=More())
    assert names(tmp_path) == ["last.ckpt", "step=5.ckpt"]


def test_a_second_suspect_overwrites_nothing(tmp_path):
    fit(tmp_path, Anomaly(11, 20))
    fit(tmp_path, Anomaly(11, 20), resume=str(tmp_path / "ck" / "step=10.ckpt"))
    suspects = [kept.path.name for kept in committed(tmp_path / "ck") if kept.manifest.suspect]
    assert suspects == ["suspect-step=12-v1.ckpt"]  # of the same run: the later one, under a name of its own


def test_a_link_that_was_being_made_when_the_process_was_killed_goes(tmp_path, monkeypatch):
    fit(tmp_path)
    replace = Path.replace

    def killed(self, target):
        if Path(target).name == "last.ckpt":
            raise Killed
        return replace(self, target)

    class Killed(BaseException):
        pass

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        link_last(tmp_path / "ck")
    monkeypatch.undo()
    assert len(list((tmp_path / "ck").glob(".last*"))) == 1
    fit(tmp_path, steps=20, resume="last")
    assert not list((tmp_path / "ck").glob(".*"))


def test_a_plain_checkpoint_beside_it_is_spoken_about(tmp_path):
    with says("Save with another VerifiedCheckpoint, or elsewhere"):
        fit(tmp_path, ModelCheckpoint(tmp_path / "ck", "plain-{step}"))


def test_by_time_and_by_epoch(tmp_path):
    from datetime import timedelta

    checkpoint = VerifiedCheckpoint(tmp_path / "ck", "{epoch}-{step}", train_time_interval=timedelta(seconds=0))
    fit(tmp_path, checkpoint=checkpoint, steps=3)
    assert names(tmp_path) == ["epoch=0-step=2.ckpt", "epoch=0-step=3.ckpt", "last.ckpt"]
    checkpoint = VerifiedCheckpoint(tmp_path / "e" / "ck", every_n_epochs=1)
    fit(tmp_path / "e", checkpoint=checkpoint, steps=-1, max_epochs=2, limit_train_batches=3)
    assert names(tmp_path / "e") == ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt", "last.ckpt"]


def test_manual_optimization_and_accumulation(tmp_path):
    fit(tmp_path / "a", module=TwoOptimizers(), steps=8)
    assert "step=8.ckpt" in names(tmp_path / "a")
    fit(tmp_path / "b", accumulate_grad_batches=4, every=2, steps=5)
    assert names(tmp_path / "b") == ["last.ckpt", "step=4.ckpt", "step=5.ckpt"]


def test_fast_dev_run_leaves_nothing(tmp_path):
    fit(tmp_path, fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_what_it_has_put_in_place_is_gone_afterwards(tmp_path):
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

    def stop(trainer, module):
        raise ZeroDivisionError

    trainer, *_ = fit(tmp_path / "a")
    assert type(trainer.strategy.checkpoint_io) is TorchCheckpointIO
    assert "load_checkpoint" not in vars(trainer.strategy)
    stopper = At(2, stop)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "b", stopper)
    assert not (tmp_path / "b" / "finished.json").exists()


def test_two_fits_with_one_object(tmp_path):
    *_, checkpoint = fit(tmp_path)
    trainer = make_trainer(
        enable_checkpointing=True, default_root_dir=tmp_path, max_steps=6, limit_val_batches=0, callbacks=[checkpoint]
    )
    trainer.fit(TinyLM(), loader())
    assert newest_checkpoint([tmp_path / "ck"]).manifest.step == 6  # another run in the same folder is the newest


def test_it_can_be_pickled_and_refuses_what_it_cannot_do(tmp_path):
    import pytorch_lightning

    assert pickle.loads(pickle.dumps(VerifiedCheckpoint(save_top_k=3))).save_top_k == 3
    for options in ({"save_top_k": 0}, {"save_top_k": -2}, {"max_failures": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            VerifiedCheckpoint(**options)
    with pytest.raises(SetupError, match="writes to local disks, and dirpath is memory://"):
        make_trainer(enable_checkpointing=True, max_steps=1, callbacks=[VerifiedCheckpoint("memory://x")]).fit(
            TinyLM(), loader()
        )
    trainer = make_trainer(pytorch_lightning, max_steps=1, callbacks=[VerifiedCheckpoint(tmp_path)])
    with pytest.raises(SetupError, match=r"serves lightning\.pytorch"):
        trainer.fit(OldTinyLM(), loader())
