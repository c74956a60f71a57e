"""The memory that preparing text takes, by its size and the tokenizer: flat.

A text, one file, of one, ten and a hundred times what is held of it, each prepared in a process of its own; the peak of
resident memory above that before. On Linux.

    python benchmarks/data_memory.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lit_transformer.data.text.cache import Recipe, prepare

HELD = 256 * 2**14  # pieces of 16 KiB that tokenizers reads ahead when it learns
WAYS = {"bytes": (1, 10, 100), "bpe": (1, 10), "unigram": (1, 10)}


def write_text(path: Path, size: int) -> None:
    """Write lines of 20 words of 5,000, the frequent ones far more often, up to a size."""
    generator = np.random.default_rng(0)
    letters = generator.integers(97, 123, (5_000, 9)).astype(np.uint8)
    words = np.array([bytes(row[: 2 + i % 8]).decode() for i, row in enumerate(letters)])
    with path.open("w") as file:
        while file.tell() < size:
            drawn = words[generator.zipf(1.2, 20_000) % len(words)].reshape(-1, 20)
            file.writelines(" ".join(row) + "\n" for row in drawn)


def resident(key: str) -> float:
    """MiB of this process that are in memory (``VmRSS``), or were at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def prepare_once(path: str, tokenizer: str) -> None:
    """Prepare a text, and print how many MiB that took."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as cache:
        prepare(Recipe(path, None, None, 0.05, 0.05, tokenizer, 512), cache)
    print(resident("VmHWM") - before)


def memory() -> None:
    """Print the table."""
    print(f"\n{'MiB of text, in one file':>35}" + "".join(f"{name:>18}" for name in WAYS))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        for times in (1, 10, 100):
            write_text(path, times * HELD)
            cells = []
            for tokenizer, sizes in WAYS.items():
                command = [sys.executable, __file__, str(path), tokenizer]
                if times in sizes:
                    found = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                    cells.append(f"{float(found):.1f} MiB")
            print(f"{times * HELD // 2**20:>35}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    prepare_once(*sys.argv[1:]) if sys.argv[1:] else memory()
