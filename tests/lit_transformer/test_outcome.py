"""What to type after a run."""

from pathlib import Path

import pytest

from lit_transformer.run.folder import RunFolder
from lit_transformer.run.outcome import go_on_command, next_command


@pytest.mark.parametrize(
    ("saved", "verdict", "command"),
    [
        (["best-step=4.ckpt", "last.ckpt"], "healthy", "test --run 'my run' --ckpt_path best"),
        (["last.ckpt"], "recovered", "test --run 'my run' --ckpt_path last"),
        ([], "healthy", "report --run 'my run'"),
        (["last.ckpt"], "at risk", "report --run 'my run'"),
        (["last.ckpt"], "not learning", "report --run 'my run'"),
    ],
)
def test_it_can_be_typed(tmp_path, monkeypatch, saved, verdict, command):
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create(Path("runs"), "my run")
    for name in saved:
        (run.checkpoints / name).touch()
    assert next_command(run, Path("runs"), verdict).endswith(f" {command}")


def test_parts_are_made_one_file_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create(Path("runs"), "a")
    (run.checkpoints / "last.ckpt").mkdir(parents=True)
    assert next_command(run, Path("runs"), "healthy").endswith(" consolidate --run a --ckpt_path last --to a.ckpt")


def test_a_root_of_its_own_is_quoted(tmp_path):
    run = RunFolder.create(tmp_path / "my runs", "a")
    assert next_command(run, tmp_path / "my runs", "healthy").endswith(
        f"report --run a --root '{tmp_path / 'my runs'}'"
    )


@pytest.mark.parametrize(
    ("saved", "diverged", "command"),
    [
        (["checkpoints/last.ckpt"], False, "fit --run a --ckpt_path last"),
        (["checkpoints/step=4.ckpt"], True, "fit --run a --ckpt_path last"),
        (["checkpoints/last.ckpt", "last_good.ckpt"], False, "fit --run a --ckpt_path last"),  # of an earlier stop
        (["checkpoints/last.ckpt", "last_good.ckpt"], True, "fit --run a --ckpt_path runs/a/last_good.ckpt"),
        ([], False, "report --run a"),
    ],
)
def test_a_run_that_was_stopped_goes_on_from_what_it_has(tmp_path, monkeypatch, saved, diverged, command):
    monkeypatch.chdir(tmp_path)
    run = RunFolder.create(Path("runs"), "a")
    for name in saved:
        (run.path / name).touch()
    assert go_on_command(run, Path("runs"), diverged).endswith(f" {command}")
