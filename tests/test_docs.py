"""What the pages link to is there; that their blocks and commands run, test_pages.py shows."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(REPOSITORY / "docs").glob("*.md"),
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / part / "README.md" for part in ("callbacks", "benchmarks")),
    ]
)
YOURS = (REPOSITORY / "docs" / "your_module.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", YOURS, re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_the_page_of_the_fine_tuned_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "block 0", "exec"), {"__name__": "page"})
    command = re.search(r"^    (python -m lit_callbacks.report .*)$", YOURS, re.MULTILINE)[1].split()
    monkeypatch.setattr(sys, "argv", ["report", *command[3:]])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lit_callbacks.report", run_name="__main__")
    assert not stop.value.code
    assert "report.html" in capsys.readouterr().out
    assert "attention" in Path("mine/version_0/report.html").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\(([^)#:\s]*)(#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor and target.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor[1:] in slugs, (path, anchor)


FIGURES = (REPOSITORY / "benchmarks" / "README.md").read_text(encoding="utf-8")


class Understood(Exception):
    """The words are right: what would run now takes minutes."""


@pytest.mark.parametrize("command", re.findall(r"`python (benchmarks/[^`]*)`", FIGURES))
def test_commands_that_reproduce_figures_are_understood(command, monkeypatch):
    script, *words = shlex.split(command)
    source = (REPOSITORY / script).read_text(encoding="utf-8")
    (name,) = set(re.findall(r"\.(parse_(?:known_)?args)\(", source)) or (None,)
    if name is None:
        assert not words
        return
    understood = getattr(argparse.ArgumentParser, name)

    def parse(parser, *args, **kwargs):
        raise Understood(understood(parser, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    with pytest.raises(Understood):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")


def test_every_script_is_named():
    assert {path.name for path in (REPOSITORY / "benchmarks").glob("*.py")} == set(re.findall(r"(\w+\.py)", FIGURES))
