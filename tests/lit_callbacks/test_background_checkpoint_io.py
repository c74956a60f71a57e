"""What is written in the background is what was there when it was asked for."""

import threading
from collections import OrderedDict

import pytest
import torch

import lit_callbacks.checkpointing.atomic_checkpoint_io as atomic
from helpers import TinyLM, loader, make_trainer, says
from lit_callbacks import VerifiedCheckpoint
from lit_callbacks.checkpointing import BackgroundCheckpointIO, load_verified, newest_checkpoint
from lit_callbacks.checkpointing.background_checkpoint_io import ReusedCopy


@pytest.fixture
def slow(monkeypatch):
    """Writing waits until it is let go."""
    go, save = threading.Event(), torch.save
    monkeypatch.setattr(atomic.torch, "save", lambda *a, **k: (go.wait(20), save(*a, **k)))
    return go


def test_the_file_has_the_values_of_the_call(tmp_path, slow):
    io, weight, counts = BackgroundCheckpointIO(), torch.zeros(1000), [1]
    io.save_checkpoint({"w": weight, "counts": counts}, tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()
    weight += 1
    counts.append(2)
    slow.set()
    loaded = io.load_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded["w"], torch.zeros(1000))
    assert loaded["counts"] == [1]
    io.teardown()


def test_memory_is_taken_once_and_shared_where_it_was():
    copier, weight = ReusedCopy(), torch.arange(1000.0)
    data = {
        "a": weight,
        "tied": weight.view(10, 100),
        "part": weight[5:7],
        "none": torch.empty(0),
        "scalar": torch.tensor(3),
    }
    first = copier.of(data)
    assert first["a"].untyped_storage()._cdata == first["tied"].untyped_storage()._cdata
    assert torch.equal(first["part"], torch.tensor([5.0, 6.0]))
    assert (first["tied"].shape, first["scalar"].item()) == ((10, 100), 3)
    place = first["a"].data_ptr()
    assert place != weight.data_ptr()
    weight += 1
    assert copier.of(data)["a"].data_ptr() == place
    assert first["a"][0] == 1  # the next copy has taken its place
    assert copier.of({"a": torch.zeros(3, 4).t()})["a"].stride() == (1, 4)


def test_a_state_dict_keeps_the_versions_of_its_modules():
    state = torch.nn.BatchNorm1d(2).state_dict()
    copied = ReusedCopy().of({"state_dict": state})["state_dict"]
    assert isinstance(copied, OrderedDict)
    assert copied._metadata == state._metadata
    assert copied["running_mean"].data_ptr() != state["running_mean"].data_ptr()


def test_what_its_memory_does_not_say_is_kept():
    conjugate = torch.tensor([1 + 2j, 3 - 1j]).conj()
    negative = torch._neg_view(torch.ones(3))
    copied = ReusedCopy().of([conjugate, negative])
    assert copied[0].tolist() == [1 - 2j, 3 + 1j]
    assert copied[1].tolist() == [-1, -1, -1]


def test_what_has_no_ordinary_memory_is_cloned():
    sparse = torch.eye(3).to_sparse()
    copied = ReusedCopy().of([sparse, (torch.nn.Parameter(torch.ones(2)), {1, 2})])
    assert torch.equal(copied[0].to_dense(), torch.eye(3))
    assert copied[1][1] == {1, 2}


def fit(folder, steps=17, **options):
    callback = VerifiedCheckpoint(folder, "{step}", every_n_train_steps=5)
    plugins = [BackgroundCheckpointIO()]
    trainer = make_trainer(
        enable_checkpointing=True,
        max_steps=steps,
        plugins=plugins,
        default_root_dir=folder,
        callbacks=[callback],
        **options,
    )
    module = TinyLM()
    trainer.fit(module, loader(n_samples=400))
    return module


def test_with_a_verified_checkpoint(tmp_path):
    module = fit(tmp_path)
    point = newest_checkpoint([tmp_path])
    assert (point.manifest.step, point.rejected) == (17, [])
    loaded = load_verified(point.path)["state_dict"]
    assert all(torch.equal(loaded[name], value) for name, value in module.state_dict().items())
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=15.ckpt", "step=17.ckpt"]


def test_an_older_one_is_there_until_the_newer_one_is(tmp_path, slow):
    thread = threading.Thread(target=fit, args=(tmp_path, 7))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()  # waits with the second save for the first
    assert not list(tmp_path.glob("*.manifest.json"))
    slow.set()
    thread.join(20)
    assert newest_checkpoint([tmp_path]).manifest.step == 7


def test_a_failure_is_told_once_and_training_goes_on(tmp_path, monkeypatch):
    save = torch.save

    def sometimes(obj, file, *args, **kwargs):
        if "step=10" in file.path.name:
            raise OSError(28, "No space left on device")
        save(obj, file, *args, **kwargs)

    monkeypatch.setattr(atomic.torch, "save", sometimes)
    with says("a save in the background has failed: .*No space left") as lines:
        fit(tmp_path, steps=21)
    assert len(lines) == 1
    assert newest_checkpoint([tmp_path]).manifest.step == 21
