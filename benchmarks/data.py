"""Tokens a second, and how many of them are padding.

Blocks from a memory-mapped array: our training loader, a plain DataLoader, and nanoGPT's get_batch, in turn. Then
texts of three distributions of lengths, in batches of 32, of 32 x 256 tokens, or packed into blocks as long as the
longest. At last every way to read the embedded corpus, and what of it the model of configs/default.yaml can train on.
One process, no workers, its CPU time. On Linux also the memory that preparing text takes, see data_memory.py.

    python benchmarks/data.py
"""

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import yaml
from data_memory import memory
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_transformer import LitCausalLM, TransformerConfig
from lit_transformer.data import (
    ClassificationData,
    LanguageModelingData,
    MaskedLanguageModelingData,
    SequencePairData,
)
from lit_transformer.data.batching.grouped import GroupedStream, padding
from lit_transformer.data.batching.loader import Blocks, TrainingLoader
from lit_transformer.data.batching.order import SampleStream
from lit_transformer.data.batching.packed import PackedBlocks
from lit_transformer.data.batching.ragged import Ragged
from lit_transformer.data.resumable import ResumableData
from lit_transformer.data.tables.padded import LabelledTexts

TOKENS, BLOCK, ROUNDS, BATCHES = 20_000_000, 256, 9, 200


class MapStyle(Dataset[tuple[Tensor, Tensor]]):
    """One block at a time, collated by the DataLoader."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path.with_suffix(".bin"), dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // BLOCK

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        block = torch.from_numpy(self.tokens[i * BLOCK : (i + 1) * BLOCK + 1].astype(np.int64))
        return block[:-1], block[1:]


def ours(path: Path, batch_size: int) -> Iterator[object]:
    """The training loader, epoch after epoch."""
    blocks = Blocks(path, BLOCK)
    loader = TrainingLoader(blocks, SampleStream(seed=0, n=len(blocks)), batch_size)
    while True:
        yield from loader


def plain(path: Path, batch_size: int) -> Iterator[object]:
    """A shuffling DataLoader."""
    while True:
        yield from DataLoader(MapStyle(path), batch_size=batch_size, shuffle=True)


def get_batch(path: Path, batch_size: int) -> Iterator[object]:
    """The loop of nanoGPT's train.py: the file opened for each batch, random crops stacked."""
    while True:
        tokens = np.memmap(path.with_suffix(".bin"), dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - BLOCK, (batch_size,))
        x = torch.stack([torch.from_numpy(tokens[i : i + BLOCK].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in starts])
        yield x, y


SIDES: dict[str, Callable[[Path, int], Iterator[object]]] = {
    "lit_transformer": ours,
    "DataLoader": plain,
    "get_batch": get_batch,
}


def measure(path: Path, batch_size: int) -> dict[str, float]:
    """Return the median tokens per CPU second of each side."""
    running = {name: side(path, batch_size) for name, side in SIDES.items()}
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(1 + ROUNDS):
        for name, batches in running.items():
            start = time.process_time()
            for _ in range(BATCHES):
                next(batches)
            rates[name].append(BATCHES * batch_size * BLOCK / (time.process_time() - start))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def lengths(generator: np.random.Generator, *parts: tuple[float, float, int], longest: int) -> list[int]:
    """Log-normal lengths: for each part its median, the standard deviation of the logarithm, and how many."""
    drawn = [generator.lognormal(np.log(median), sigma, n) for median, sigma, n in parts]
    return [int(length) for length in np.clip(np.concatenate(drawn), 1, longest)]


def packed(folder: str, found: list[int]) -> str:
    """The same of documents that are packed; with one more token each, which ends it."""
    path = Path(folder, "train.npy")
    np.save(path, np.ones(sum(found) + len(found), dtype=np.uint16))
    np.save(path.with_suffix(".documents.npy"), np.cumsum([0, *(length + 1 for length in found)]))
    blocks = PackedBlocks(path, max(found))
    loader = TrainingLoader(blocks, SampleStream(0, len(blocks)), 32)
    start, batches = time.process_time(), [len(batch["input_ids"]) for batch in loader]
    rate = sum(batches) * blocks.block_size * blocks.filled / (time.process_time() - start)
    return f"{1 - blocks.filled:.1%} padding, {rate / 1e6:.0f} Mtok/s"


def texts(folder: str) -> None:
    """Print the padding, and the tokens a second that are none, of each way to make batches."""
    generator = np.random.default_rng(0)
    distributions = {
        "texts, median 180, at most 1024": lengths(generator, (180, 0.9, 20_000), longest=1024),
        "chat, medians 60 and 600": lengths(generator, (60, 0.5, 10_000), (600, 0.5, 10_000), longest=1024),
        "sentences, median 22, at most 128": lengths(generator, (22, 0.6, 20_000), longest=128),
    }
    ways = {"random": (None, 32), "group_by_length": (False, 32), "max_tokens": (True, 32 * 256)}
    print(f"\n{'':>35}" + "".join(f"{name:>28}" for name in [*ways, "packing"]))
    for name, found in distributions.items():
        samples = LabelledTexts(name, Ragged([[1] * length for length in found]), [0] * len(found), pad_id=0)
        cells = []
        for by_tokens, size in ways.values():
            stream = SampleStream(0) if by_tokens is None else GroupedStream(0, by_tokens)
            stream.over(samples.lengths())
            loader = TrainingLoader(samples, stream, size)
            start, drawn = time.process_time(), [batch["sample_ids"].numpy() for batch in loader]
            rate = sum(found) / (time.process_time() - start)
            cells.append(f"{padding(samples.lengths(), iter(drawn)):.1%} padding, {rate / 1e6:.0f} Mtok/s")
        cells.append(packed(folder, found))
        print(f"{name:>35}" + "".join(f"{cell:>28}" for cell in cells))


PATHS: dict[str, Callable[[str], ResumableData]] = {
    "blocks": lambda cache: LanguageModelingData(batch_size=8, cache_dir=cache),
    "blocks, packing": lambda cache: LanguageModelingData(batch_size=8, packing=True, cache_dir=cache),
    "masked": lambda cache: MaskedLanguageModelingData(batch_size=8, cache_dir=cache),
    "masked, packing": lambda cache: MaskedLanguageModelingData(batch_size=8, packing=True, cache_dir=cache),
    "classes": lambda cache: ClassificationData(cache_dir=cache),
    "classes, group_by_length": lambda cache: ClassificationData(group_by_length=True, cache_dir=cache),
    "classes, max_tokens": lambda cache: ClassificationData(max_tokens=8192, cache_dir=cache),
    "classes, token_dropout": lambda cache: ClassificationData(token_dropout=0.1, cache_dir=cache),
    "pairs": lambda cache: SequencePairData(cache_dir=cache),
    "pairs, group_by_length": lambda cache: SequencePairData(group_by_length=True, cache_dir=cache),
}


def real_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens that are no padding, but for what little packing leaves."""
    targets = batch["targets"]
    if "attention_mask" not in batch:
        return targets.numel()
    return int(batch["attention_mask"].sum()) + (int((targets != -100).sum()) if targets.ndim == 2 else 0)


def consumed(batch_size: int = 8, steps: int = 20) -> float:
    """Median tokens per CPU second that the default model trains on."""
    shape = yaml.safe_load((Path(__file__).parents[1] / "configs/default.yaml").read_text())["model"]["init_args"]
    task = LitCausalLM(TransformerConfig(vocab_size=256, **shape["config"]))
    optimizer = torch.optim.AdamW(task.parameters())
    ids = torch.randint(256, (batch_size, BLOCK))
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        task.training_loss({"input_ids": ids, "targets": ids}).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return batch_size * BLOCK / statistics.median(seconds)


def paths(folder: str) -> None:
    """Print tokens a second, padding not counted, of each data module."""
    model = consumed()
    print(f"\n{'the default model takes':>28}{model / 1e3:>10.1f} ktok/s")
    for name, make in PATHS.items():
        data = make(folder)
        data.setup()
        rates = []
        for _ in range(ROUNDS):
            start, tokens = time.process_time(), 0
            for batch in islice(data.train_dataloader(), BATCHES // 2):
                tokens += real_tokens(batch)
            rates.append(tokens / (time.process_time() - start))
        rate = statistics.median(rates)
        print(f"{name:>28}{rate / 1e6:>10.1f} Mtok/s {rate / model:>10,.0f}x the default model")


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {platform.system()}, torch {torch.__version__}, one thread, {TOKENS:,} uint16 tokens")
    print(f"{'batch':>18}" + "".join(f"{name:>18}" for name in SIDES) + f"{'x DataLoader':>18}{'x get_batch':>18}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokens.npy")
        tokens = np.random.default_rng(0).integers(0, 50_000, TOKENS).astype(np.uint16)
        np.save(path, tokens)
        tokens.tofile(path.with_suffix(".bin"))
        for batch_size in (8, 32):
            rates = measure(path, batch_size)
            us, loader, crops = rates.values()
            ratios = [f"{us / loader:.1f}", f"{us / crops:.1f}"]
            cells = [f"{rate / 1e6:.0f} Mtok/s" for rate in rates.values()] + ratios
            print(f"{f'{batch_size} x {BLOCK}':>18}" + "".join(f"{cell:>18}" for cell in cells))
        texts(folder)
        paths(folder)
    if sys.platform == "linux":
        memory()


if __name__ == "__main__":
    main()
