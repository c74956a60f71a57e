"""What the README says can be done, can be done."""

import re
import shlex
from pathlib import Path

import pytest

from lit_transformer.cli import main

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    python cli.py ")]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[number], f"README block {number}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.partition("#")[0])[2:]
    if words[0] not in ("fit", "check", "memory") or "--ckpt_path" in words:
        with pytest.raises(SystemExit):
            main(words)
        assert "runs/mine" in capsys.readouterr().err  # understood, but there is no such run here
    else:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code == 0


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_linked_files_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / path).exists(), path


def test_it_stays_short():
    assert len(README.splitlines()) <= 150


DOCS = sorted((REPOSITORY / "docs").glob("*.md"))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_what_the_docs_name_exists(path):
    text = path.read_text(encoding="utf-8")
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (REPOSITORY / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in sources, name
    for name in re.findall(r"(benchmarks/\w+\.py|tests/\w+\.py)", text):
        assert (REPOSITORY / name).exists(), name


def test_the_fault_matrix_is_complete():
    rows = re.findall(r"^\| (\d+) \|", (REPOSITORY / "docs" / "reliability.md").read_text(), re.MULTILINE)
    assert rows == [str(number) for number in range(1, 36)]
