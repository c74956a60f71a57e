"""Training under every strategy, with two processes on CPUs (or four), against one with the same global batch.

Each cell of the grid {strategy} x {fp32, bf16, fp16 with a GradScaler} x {1, 2 batches a step} x {clipped, not clipped}
is one run of 40 steps in which one rank's loss is not a number at step 12, a batch is wild at step 26, and weights are
damaged at step 30. Printed are the largest relative deviations from the single process: of a step's loss, of a weight's
absolute sum at the end, of gradient norms (total, before and after clipping); and whether recovery did the same at the
same steps, and a run resumed at step 20 is the same bit for bit. A run takes a few seconds.

    python benchmarks/strategies.py
    python benchmarks/strategies.py --strategies fsdp2 fsdp
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from helpers import run_ranks  # noqa: E402
from strategy_worker import GRID, STRATEGIES, Cell, cells, resumed_part  # noqa: E402

NORMS = ("grad_norm/total", "grad_norm/clipped")


def deviation(found: dict, wanted: dict) -> float:
    """The largest relative one. What is not a number has to be so on both sides."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    pairs = [(found[key], wanted[key]) for key in wanted]
    assert all((a != a) == (b != b) for a, b in pairs)
    return max((abs(a - b) / abs(b) for a, b in pairs if b and a == a), default=0.0)


class Row(NamedTuple):
    """What a cell gives under a strategy, against one process."""

    strategy: str
    cell: Cell
    losses: float
    weights: float
    norms: float
    same_events: bool
    same_resumed: bool


def main() -> None:
    """Print a line for each cell, and a table of the worst by strategy and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = [name for name in STRATEGIES if name != "single"]
    parser.add_argument("--strategies", nargs="+", default=several, choices=several)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        text = out / "text.txt"
        text.write_text("".join(f"{i * i % 97:03d}, {i:04d}; " for i in range(4000)))
        alone = {cell: cell.run(out / "single", str(text), "single") for cell in GRID}
        rows = []
        for strategy in options.strategies:
            possible = cells(strategy)
            (out / strategy).mkdir()
            words = (strategy, str(text), "", *[str(GRID.index(cell)) for cell in possible])
            worker, n = TESTS / "strategy_worker.py", STRATEGIES[strategy][0]
            ranks = run_ranks(worker, out / strategy, strategy, *words, n=n, timeout=3600)
            for cell in possible:
                rows.append(row(strategy, cell, ranks, alone[cell]))
                print(*rows[-1], sep=", ", flush=True)
    print(table(rows))


def row(strategy: str, cell: Cell, ranks: list[dict], alone: dict) -> Row:
    """Compare the first and the last rank with one process."""
    first, last = ranks[0][str(cell)], ranks[-1][str(cell)]
    losses = {step: (loss + last["losses"][step]) / 2 for step, loss in first["losses"].items()}
    return Row(
        strategy,
        cell,
        deviation(losses, alone["losses"]),
        deviation(first["weights"], alone["weights"]),
        deviation(norms(first), norms(alone)),
        first["events"] == alone["events"],
        first["resumed"] == resumed_part(first),
    )


def table(rows: Iterable[Row]) -> str:
    """The worst of each strategy and precision, over accumulation and clipping."""
    lines = [
        "| strategy | precision | losses | weights | gradient norms | recovery | resumed |",
        "|---|---|---|---|---|---|---|",
    ]
    together: dict[tuple[str, str], list[Row]] = {}
    for found in rows:
        together.setdefault((found.strategy, found.cell.precision), []).append(found)
    for (strategy, precision), group in together.items():
        worst = [max(getattr(found, name) for found in group) for name in ("losses", "weights", "norms")]
        events = "same steps" if all(found.same_events for found in group) else "OTHER STEPS"
        resumed = "bit for bit" if all(found.same_resumed for found in group) else "DIFFERS"
        values = " | ".join(f"{value:.0e}" for value in worst)
        lines.append(f"| {strategy} | {precision} | {values} | {events} | {resumed} |")
    return "\n".join(lines)


def norms(side: dict) -> dict[str, float]:
    """The gradient norms of a run by step and key."""
    logged = side["logged"].items()
    return {f"{step} {key}": metrics[key] for step, metrics in logged for key in NORMS if key in metrics}


if __name__ == "__main__":
    main()
