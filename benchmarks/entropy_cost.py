"""What attention entropy costs, in time and memory, against a softmax that is written down.

The last table of ``monitor_overhead.py``, by itself:

    python benchmarks/entropy_cost.py
"""

import argparse
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from overhead_fits import HEADS, WIDTH, fit_language_model, quartiles
from torch import Tensor

from lit_callbacks.functional import ENTROPY_BINS, attention_statistics


def materialised(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    """Entropy of each row of attention, the plain way."""
    scores = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    weights = scores.softmax(-1)
    return -(weights * (weights + 1e-12).log()).sum(-1)


def queries_and_keys(length: int, tokens: int = 2048) -> tuple[Tensor, Tensor]:
    """As a model has them: two thirds of one projection, seen as heads."""
    generator = torch.Generator().manual_seed(length)
    qkv = 1.5 * torch.randn(tokens // length, length, 3 * WIDTH, generator=generator)
    q, k, _ = qkv.view(tokens // length, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind()
    return q, k


def largest_error(q: Tensor, k: Tensor, is_causal: bool) -> float:
    """Of each head's mean normalised entropy, against fp64."""
    table, _ = attention_statistics(q, k, is_causal=is_causal)
    entropy = materialised(q.double(), k.double(), is_causal)
    visible = torch.arange(1, q.size(-2) + 1) if is_causal else torch.full((q.size(-2),), k.size(-2))
    rows = visible > 1
    exact = (entropy[..., rows] / visible[rows].log()).mean((0, 2))
    return float((table[:, ENTROPY_BINS + 1] / table[:, ENTROPY_BINS] - exact).abs().max())


def peak_memory(way: str, length: int, is_causal: bool, times: int) -> float | None:
    """Most MB that one call of one way has taken in some processes of its own; None where the system does not say."""
    command = [sys.executable, __file__, "--memory", way, str(length), str(int(is_causal))]
    answers = [subprocess.run(command, capture_output=True, text=True, check=False).stdout for _ in range(times)]
    return max((float(answer) for answer in answers if answer.strip()), default=None)


def print_peak_memory(way: str, length: int, is_causal: bool) -> None:
    """In that process: call it once, and print by how much the largest resident set has grown."""
    call = attention_statistics if way == "ours" else materialised
    q, k = (x.clone() for x in queries_and_keys(length))
    with torch.no_grad():
        call(q[:, :, :64], k[:, :, :64], is_causal=is_causal)  # what is loaded on first use
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return
        before = high_water_mark()
        call(q, k, is_causal=is_causal)
        print((high_water_mark() - before) / 1024)


def high_water_mark() -> int:
    """KB of the largest resident set so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def print_entropy(folder: str) -> None:
    """The table of attention entropy, after a few steps of training, so that memory is handed out as it is there."""
    fit_language_model([], folder, steps=3)
    print(
        f"\nAttention entropy of one layer, {HEADS} heads of {WIDTH // HEADS}, fp32, against a softmax that is written"
    )
    print(
        "down. There are 2048 tokens in all, so that memory linear in T is the same in all rows. Memory: growth of the"
    )
    print("resident set, ours the largest of three. Error: the largest of a head's mean, against fp64.\n")
    print("| T | mask | ours, ms | softmax, ms | ratio [quartiles] | ours, MB | softmax, MB | error |")
    print("|---|---|---|---|---|---|---|---|")
    for length, is_causal in ((256, True), (512, True), (1024, True), (2048, True), (2048, False)):
        q, k = queries_and_keys(length)
        ways = (attention_statistics, materialised)
        times: list[tuple[float, ...]] = []
        with torch.no_grad():
            for turn in range(8):
                seconds = {}
                for way in ways[:: (-1) ** turn]:
                    start = time.process_time()
                    way(q, k, is_causal=is_causal)
                    seconds[way] = time.process_time() - start
                times.append(tuple(seconds[way] for way in ways))
            error = largest_error(q, k, is_causal)
        ours, peer = (statistics.median(column) * 1e3 for column in zip(*times[1:], strict=True))
        low, middle, high = quartiles([a / b for a, b in times[1:]])
        memory = [peak_memory("ours", length, is_causal, times=3), peak_memory("softmax", length, is_causal, times=1)]
        shown = " | ".join("-" if mb is None else f"{mb:.1f}" for mb in memory)
        print(
            f"| {length} | {'causal' if is_causal else 'none'} | {ours:.1f} | {peer:.1f} "
            f"| {middle:.3f} [{low:.3f}, {high:.3f}] | {shown} | {error:.0e} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        way, length, is_causal = arguments.memory
        print_peak_memory(way, int(length), bool(int(is_causal)))
        return
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        print_entropy(folder)


if __name__ == "__main__":
    main()
