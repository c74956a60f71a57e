"""Files that are whole or not there, manifests that tell, and the choice of what to go on from."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from helpers import TinyLM, loader, make_trainer
from lit_callbacks import CheckpointError
from lit_callbacks.checkpointing import AtomicCheckpointIO, Manifest, load_verified, newest_checkpoint, verify
from lit_callbacks.checkpointing import _durable as durable
from lit_callbacks.checkpointing.atomic_checkpoint_io import remove
from lit_callbacks.checkpointing.manifest import contents, manifest_path, read_manifest
from lit_callbacks.checkpointing.shelf import is_whole

SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def commit(folder, step, attempt=1, suspect=None, text=None, name="step"):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}={step}.ckpt"
    path.write_text(text or f"weights {step}")
    Manifest(step, 0, attempt, "run", "owner", float(step), suspect, {}, contents(path)).write(path)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_its_digest_is_that_of_the_standard(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_text("old")
    assert durable.replace_durably(path, lambda file: (file.write(b"a"), file.write(b"bc"))) == (3, SHA256_OF_ABC)
    assert path.read_text() == "abc"
    assert names(tmp_path) == ["a.ckpt"]


def test_a_save_that_fails_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        durable.replace_durably(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.ckpt"]


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path):
    host, dead, alive = durable._host(), dead_process(), os.getppid()
    for pid in (dead, alive):
        (tmp_path / f".step=1.ckpt.{host}.{pid}.01234567.partial").touch()
    (tmp_path / f".step=1.ckpt.elsewhere.{dead}.01234567.partial").touch()
    (tmp_path / "step=2.ckpt").touch()  # its maker died before it was committed
    (tmp_path / f".step=2.ckpt.{host}.{dead}.01234567.unfinished").touch()
    commit(tmp_path, 3)  # its maker died after that
    (tmp_path / f".step=3.ckpt.{host}.{dead}.01234567.unfinished").touch()
    (tmp_path / "foreign.ckpt").touch()
    assert newest_checkpoint([tmp_path]).path.name == "step=3.ckpt"
    durable.remove_leftovers(tmp_path, is_whole, remove)
    assert names(tmp_path) == [
        f".step=1.ckpt.elsewhere.{dead}.01234567.partial",
        f".step=1.ckpt.{host}.{alive}.01234567.partial",
        "foreign.ckpt",
        "step=3.ckpt",
        "step=3.ckpt.manifest.json",
    ]


def test_a_manifest_says_what_is_wrong(tmp_path):
    path = commit(tmp_path, 5)
    assert verify(path) == read_manifest(path)
    path.write_text("weights 6")
    with pytest.raises(CheckpointError, match="contents have changed since it was saved"):
        verify(path)
    path.write_text("weig")
    with pytest.raises(CheckpointError, match="it has 4 bytes, and had 9 when saved"):
        verify(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="the file is gone"):
        verify(path)
    manifest_path(path).unlink()
    with pytest.raises(CheckpointError, match="no manifest: saving it was never completed"):
        verify(path)


def test_a_manifest_that_was_changed_is_damaged_wherever_it_was(tmp_path):
    path = commit(tmp_path, 5)
    whole = manifest_path(path).read_bytes()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1
        manifest_path(path).write_bytes(changed)
        try:
            assert read_manifest(path).step == 5  # a changed blank is harmless
        except CheckpointError as error:
            assert "damaged" in str(error)  # noqa: PT017 - either way is right
    manifest_path(path).write_bytes(whole[:50])
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(path)
    facts = json.loads(whole)
    assert facts["files"]["."]["bytes"] == 9
    manifest_path(path).write_text(json.dumps(facts | {"step": 6}))
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(path)


def test_a_folder_is_verified_file_by_file(tmp_path):
    path = tmp_path / "step=1.ckpt"
    (path / "shards").mkdir(parents=True)
    for name in ("a", "b"):
        (path / "shards" / name).write_text(name)
    Manifest(1, 0, 1, "run", "owner", None, None, {}, contents(path)).write(path)
    assert set(verify(path).files) == {"shards/a", "shards/b"}
    (path / "shards" / "b").write_text("c")
    with pytest.raises(CheckpointError, match="shards/b: its contents have changed"):
        verify(path)
    (path / "shards" / "b").unlink()
    with pytest.raises(CheckpointError, match="a part of it is gone: b"):
        verify(path)


def test_the_newest_by_attempt_and_step_and_not_by_time(tmp_path):
    assert newest_checkpoint([tmp_path / "nowhere"]) is None
    old = commit(tmp_path, 10)
    new = commit(tmp_path, 20)
    os.utime(old, (4e9, 4e9))
    assert newest_checkpoint([tmp_path]).path == new
    branch = commit(tmp_path, 15, attempt=2)  # somebody went back to step 10 on purpose
    point = newest_checkpoint([tmp_path], reached=18)
    assert (point.path, point.steps_lost, point.rejected) == (branch, 3, [])


def test_it_walks_back_and_says_what_that_costs(tmp_path):
    first = commit(tmp_path, 10)
    commit(tmp_path, 20).write_text("weights 99")
    commit(tmp_path, 30).unlink()
    commit(tmp_path, 40, suspect="an anomaly was open")
    (tmp_path / "last.ckpt").symlink_to("step=50.ckpt")
    point = newest_checkpoint([tmp_path])
    assert (point.path, point.manifest.step, point.steps_lost) == (first, 10, 30)
    text = point.describe()
    for part in ("step=20.ckpt: its contents", "step=30.ckpt: its manifest is there, but", "step=40.ckpt: an anomaly"):
        assert part in text
    assert "last.ckpt: it has no manifest" in text
    assert text.endswith("30 steps are lost and will be made again.")


def test_files_of_which_none_is_good_are_an_error(tmp_path):
    (tmp_path / "last.ckpt").write_text("from somewhere else")
    with pytest.raises(CheckpointError, match=r"none of them can be trusted[\s\S]*last.ckpt: it has no manifest"):
        newest_checkpoint([tmp_path])


def saved(tmp_path, name="a.ckpt"):
    path = tmp_path / name
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.arange(1000.0)}, "step": 3}, path)
    return path


def test_what_was_saved_is_loaded(tmp_path):
    loaded = AtomicCheckpointIO().load_checkpoint(saved(tmp_path))
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(1000.0))
    assert loaded["step"] == 3


def test_every_flipped_bit_in_a_tensor_is_found_without_a_manifest(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    start = whole.index(torch.arange(1000.0).numpy().tobytes()[:64])
    for at in (start, start + 1999, start + 3999):
        changed = bytearray(whole)
        changed[at] ^= 0x40
        path.write_bytes(changed)
        torch.load(path, weights_only=True)  # torch does not see it
        with pytest.raises(CheckpointError, match="does not match its CRC-32"):
            load_verified(path)


def test_no_damage_without_a_manifest_is_silent_or_another_error(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"w": torch.arange(4.0), "s": 3}, path)
    whole, refused = path.read_bytes(), 0
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 0x80
        path.write_bytes(changed)
        try:
            loaded = load_verified(path)
        except CheckpointError:
            refused += 1
        else:
            assert loaded["s"] == 3
            assert torch.equal(loaded["w"], torch.arange(4.0)), at
    assert refused > len(whole) // 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), "is torn, or is none"),
        (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "is torn, or is none"),
        (lambda p: p.unlink(), "there is no checkpoint"),
        (lambda p: (p.unlink(), p.symlink_to("nowhere.ckpt")), "a link to a file that is gone"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path, damage, message):
    path = saved(tmp_path)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        load_verified(path)


def test_a_url_is_refused_before_anything_is_fetched():
    for url in ("https://example.org/a.ckpt", "http://x/a.ckpt", "s3://bucket/a.ckpt", "file:///tmp/a.ckpt"):
        with pytest.raises(CheckpointError, match="is not on a local disk: download it"):
            AtomicCheckpointIO().load_checkpoint(url)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "x": Payload()}, path)
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        load_verified(path)
    assert not (tmp_path / "executed").exists()


def test_the_file_has_no_copy_of_shared_weights(tmp_path):
    weight = torch.zeros(100_000)
    AtomicCheckpointIO().save_checkpoint({"a": weight, "b": weight.view(100, 1000)}, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_size < 1.1 * 400_000
    assert zipfile.ZipFile(tmp_path / "a.ckpt").testzip() is None


@pytest.mark.parametrize("wrap", [lambda io: io, AsyncCheckpointIO], ids=["direct", "async"])
def test_as_a_plugin_of_any_trainer(tmp_path, wrap):
    from lightning.pytorch.callbacks import ModelCheckpoint

    callback = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    options = {"enable_checkpointing": True, "max_steps": 4, "plugins": [wrap(AtomicCheckpointIO())]}
    trainer = make_trainer(callbacks=[callback], **options)
    trainer.fit(TinyLM(), loader())
    last = load_verified(Path(callback.last_model_path))
    assert last["global_step"] == 4
    assert not list(tmp_path.glob(".*"))
