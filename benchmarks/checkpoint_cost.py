"""What a checkpoint costs: saving, blocking, verifying, and memory; each beside the plain way, interleaved, as a ratio.

- Saving: `AtomicCheckpointIO` (temporary file, sync, rename, sync of the folder, SHA-256) against `torch.save` and
  `fsync` to the same folder; wall time and CPU time of the process.
- Blocking: how long training waits for `BackgroundCheckpointIO`, against `torch._foreach_copy_` into memory that is
  there already, and Lightning's `AsyncCheckpointIO` around `AtomicCheckpointIO`.
- Loading: verifying and loading against `torch.load`.
- Memory: the highest resident memory during a save, above that before it, in sizes of the checkpoint.

    python benchmarks/checkpoint_cost.py                 # 60 and 240 MB, some two minutes
    python benchmarks/checkpoint_cost.py --rounds 5 --folder /somewhere
"""

import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lit_callbacks.checkpointing import AtomicCheckpointIO, BackgroundCheckpointIO, load_verified
from lit_callbacks.checkpointing.manifest import Manifest

MANIFEST = Manifest(1, 0, 1, "run", "owner", 1.0, None, {})


def checkpoint_of(megabytes: int) -> dict[str, Any]:
    """Weights and two moments, in tensors of 1 to 4 MB."""
    torch.manual_seed(0)
    count = max(1, megabytes * 10**6 // 4 // 3 // 500_000)
    weights = {f"layer{i}.weight": torch.randn(500, 1000) for i in range(count)}
    states = {i: {"exp_avg": torch.randn(500, 1000), "exp_avg_sq": torch.rand(500, 1000)} for i in range(count)}
    return {"state_dict": weights, "optimizer_states": [{"state": states}], "global_step": 1}


def timed(act: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    act()
    return time.perf_counter() - wall, time.process_time() - cpu


def plain_save(checkpoint: dict[str, Any], path: Path) -> None:
    """What one would write by hand."""
    with path.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def ratios(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], which: int) -> str:
    """Median of the paired ratios, and quartiles."""
    values = [a[which] / b[which] for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def milliseconds(values: list[tuple[float, float]]) -> str:
    """Median."""
    return f"{1000 * statistics.median(value[0] for value in values):.0f} ms"


def saving(checkpoint: dict[str, Any], folder: Path, rounds: int) -> list[str]:
    """Rows for saving and loading."""
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    loads: list[tuple[float, float]] = []
    plain: list[tuple[float, float]] = []
    io, a, b = AtomicCheckpointIO(), folder / "a.ckpt", folder / "b.ckpt"
    for i in range(rounds + 1):
        for act, into in _turns(
            i, (lambda: io.save_checkpoint(checkpoint, a, MANIFEST), ours), (lambda: plain_save(checkpoint, b), theirs)
        ):
            into.append(timed(act))
        for act, into in _turns(
            i, (lambda: load_verified(a), loads), (lambda: torch.load(b, weights_only=True), plain)
        ):
            into.append(timed(act))
        for path in (a, b):
            path.unlink()
    for values in (ours, theirs, loads, plain):
        del values[0]  # the first round fills caches
    return [
        f"| save, against torch.save and fsync | {ratios(ours, theirs, 0)} | {ratios(ours, theirs, 1)} | "
        f"{milliseconds(ours)} against {milliseconds(theirs)} |",
        f"| verify and load, against torch.load | {ratios(loads, plain, 0)} | {ratios(loads, plain, 1)} | "
        f"{milliseconds(loads)} against {milliseconds(plain)} |",
    ]  # fmt: skip


def blocking(checkpoint: dict[str, Any], folder: Path, rounds: int) -> list[str]:
    """Rows for saving in the background."""
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    copies: list[tuple[float, float]] = []
    background, asynchronous = BackgroundCheckpointIO(), AsyncCheckpointIO(AtomicCheckpointIO())
    sources = _tensors(checkpoint)
    buffers = [torch.empty_like(t) for t in sources]
    for i in range(rounds + 1):
        turns = (
            (lambda: background.save_checkpoint(checkpoint, folder / "a.ckpt"), ours),
            (lambda: asynchronous.save_checkpoint(checkpoint, folder / "b.ckpt"), theirs),
            (lambda: torch._foreach_copy_(buffers, sources), copies),
        )
        for act, into in _turns(i, *turns):
            into.append(timed(act))
            background.finish()
            asynchronous.teardown()
    for values in (ours, theirs, copies):
        del values[0]
    return [
        f"| background, against a foreach copy | {ratios(ours, copies, 0)} | | {milliseconds(ours)} against "
        f"{milliseconds(copies)} |",
        f"| AsyncCheckpointIO, against a foreach copy | {ratios(theirs, copies, 0)} | | {milliseconds(theirs)} |",
    ]


def memory(megabytes: int, folder: Path) -> list[str]:
    """Rows for memory, each save in a process of its own."""
    found = {}
    for name, io in (("AtomicCheckpointIO", AtomicCheckpointIO), ("Lightning's TorchCheckpointIO", TorchCheckpointIO)):
        read, write = os.pipe()
        if os.fork() == 0:
            checkpoint = checkpoint_of(megabytes)
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident("VmHWM:")
            io().save_checkpoint(checkpoint, folder / "memory.ckpt")
            os.write(write, str(_resident("VmHWM:") - before).encode())
            os._exit(0)
        os.wait()
        found[name] = int(os.read(read, 32)) / (megabytes * 10**6)
    return [f"| memory during a save, {name} | {copies:.2f} copies | | |" for name, copies in found.items()]


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def _tensors(data: Any) -> list[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        return [data]
    items = data.values() if isinstance(data, dict) else data if isinstance(data, list) else []
    return [tensor for item in items for tensor in _tensors(item)]


def _turns(i: int, *sides: Any) -> list[Any]:
    """Another one first in each round."""
    return [*sides[i % len(sides) :], *sides[: i % len(sides)]]


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, default=None, help="Where to save; a temporary folder by default.")
    options = parser.parse_args()
    for megabytes in (60, 240):
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            print(f"\n{megabytes} MB, median of paired ratios (quartiles), {options.rounds} rounds, {_processor()}\n")
            print("| | wall | CPU | |\n|---|---|---|---|")
            rows = memory(megabytes, folder) if Path("/proc/self/clear_refs").exists() else []
            checkpoint = checkpoint_of(megabytes)
            rows += saving(checkpoint, folder, options.rounds) + blocking(checkpoint, folder, options.rounds)
            print("\n".join(rows))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
