"""What a person who waits is told, and when."""

import io

import pytest

from lit_transformer.data.text import progress
from lit_transformer.data.text.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that each look moves on by a second, after the first."""
    now = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))


def run(pieces=20):
    with Progress("reading", total=20_000_000) as shown:
        return list(shown.over(["é" * 500_000] * pieces))  # a megabyte each


def test_a_line_after_three_seconds_and_every_ten(capsys, clock):
    assert len(run()) == 20
    assert capsys.readouterr().err == (
        "reading: 15% of 20 MB, 17 s left\n"  # three of twenty in three seconds
        "reading: 65% of 20 MB, 7 s left\n"
    )


def test_a_bar_on_a_terminal(monkeypatch, clock):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    run(4)
    assert terminal.getvalue() == (
        "\rreading: |###                 | 15% of 20 MB, 17 s left\033[K"
        "\rreading: |####                | 20% of 20 MB, 16 s left\033[K\n"
    )


def test_nothing_where_it_is_quick_and_on_other_ranks(capsys, monkeypatch, clock):
    run(2)
    monkeypatch.setattr(progress.rank_zero_only, "rank", 1, raising=False)
    run()
    assert capsys.readouterr().err == ""
