"""What the README says is there, is there; that its blocks and commands run, test_pages.py shows."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


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
