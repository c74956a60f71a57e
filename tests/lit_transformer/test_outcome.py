"""What to type after a run."""

from pathlib import Path

import pytest

from lit_transformer.run.folder import RunFolder
from lit_transformer.run.outcome import next_command


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
