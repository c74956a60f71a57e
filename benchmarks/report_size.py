"""How long does a report take, and how large is it, for a long run?

A made-up run of 100,000 steps with a spike: the loss of every tenth step, gradient norms, entropies, kurtosis and dead
units of 24 layers and the rest every fiftieth, 40 recoveries. What is read and written is what a real run has. Seconds
are of the CPU, which other work on the machine changes little, and on the wall, which is what a person waits for;
starting Python and importing Lightning is measured apart.

    python benchmarks/report_size.py                   # 100,000 steps
    python benchmarks/report_size.py --every 1         # the loss of every step
"""

import argparse
import csv
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from lit_callbacks.report import as_json, page, read_run, write_report

SPIKE = 77_770

T = TypeVar("T")


def rows(steps: int, layers: int, every: int) -> Iterator[tuple[int, str, str]]:
    """Lines of ``metrics.csv``."""
    generator = random.Random(0)
    for step in range(0, steps, every):
        loss = 2.0 + 8.0 / (1 + step / 500) + generator.gauss(0, 0.05)
        yield step, "train/loss", f"{30.0 if step == SPIKE else loss:.8g}"
        yield step, "lr/decay", f"{1e-3 * min(1.0, step / 1000) * (1 - step / steps):.8g}"
        if step % 50:
            continue
        for key in ("grad_norm/total", "grad_norm/clipped", "throughput/tokens_per_second", "throughput/total_tokens"):
            yield step, key, f"{math.exp(generator.gauss(0, 0.2)):.8g}"
        for layer in range(layers):
            name = f"model_blocks_{layer}"
            yield step, f"grad_norm/layer_{layer}", f"{math.exp(generator.gauss(-2, 0.3)):.8g}"
            yield step, f"attention_entropy/{name}_attention", f"{generator.uniform(0.3, 0.7):.8g}"
            yield step, f"attention_logit_max/{name}_attention", f"{generator.uniform(3, 9):.8g}"
            yield step, f"residual/kurtosis_{name}", f"{generator.uniform(0, 5):.8g}"
            yield step, f"dead_neurons/{name}_feed_forward", f"{generator.uniform(0, 0.1):.8g}"


def make_run(folder: Path, steps: int, layers: int, every: int) -> int:
    """Write it, and return the number of lines."""
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        lines = list(rows(steps, layers, every))
        csv.writer(file).writerows([("step", "key", "value"), *lines])
    skips = [{"step": step, "event": "skip", "rule": "loss", "loss": 30.0} for step in range(2000, steps, steps // 40)]
    (folder / "events.jsonl").write_text("".join(json.dumps(skip) + "\n" for skip in skips), encoding="utf-8")
    return len(lines)


def timed(work: Callable[[], T]) -> tuple[T, str]:
    """What it returns, and two columns: seconds of the CPU, with those of finished children, and on the wall."""
    before = os.times()
    result = work()
    spent = [then - now for then, now in zip(os.times(), before, strict=True)]
    return result, f"{sum(spent[:4]):.2f} | {spent[4]:.2f}"


def main() -> None:
    """Print a row for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--every", type=int, default=10, help="steps between losses")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines = make_run(folder, arguments.steps, arguments.layers, arguments.every)
        print(f"{arguments.steps:,} steps, {arguments.layers} layers, {lines:,} lines of metrics.csv\n")
        print("| part | CPU seconds | wall seconds | MB |\n|---|---|---|---|")
        run, took = timed(lambda: read_run(folder))
        print(f"| reading | {took} | {(folder / 'metrics.csv').stat().st_size / 1e6:.2f} |")
        for name, make in (("page", page), ("JSON", as_json)):
            text, took = timed(lambda make=make: make([run]))
            print(f"| {name} | {took} | {len(text.encode()) / 1e6:.2f} |")
            if name == "page":
                data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', text)[0])
                assert max(data[0]["high"]) == 30.0, "the spike was lost"
        _, took = timed(lambda: write_report([run], folder / "report.png"))
        print(f"| picture | {took} | {(folder / 'report.png').stat().st_size / 1e6:.2f} |")
        for name, words in (
            ("the whole command", ["-m", "lit_callbacks.report", str(folder)]),
            ("of which importing torch and Lightning", ["-c", "import lit_callbacks"]),
        ):
            command = [sys.executable, *words]
            _, took = timed(lambda command=command: subprocess.run(command, check=True, capture_output=True))
            print(f"| {name} | {took} | |")


if __name__ == "__main__":
    main()
