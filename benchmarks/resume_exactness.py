"""Resume exactness: killed in the middle of an epoch or at its end and gone on with, is it the same run?

A regression with dropout on 40 numbered samples in batches of 4, three epochs, with every kind of training loader that
people use, first with what Lightning does alone (`ModelCheckpoint`), then with `VerifiedCheckpoint` and `ExactResume`.
Saved and killed in the middle of the second epoch (step 14), or saved on its last batch (step 20). Counted are the
samples of the epoch under way that are seen twice or never; compared are the order of all samples and, bit for bit, the
weights at the end.

    python benchmarks/resume_exactness.py        # some 30 s
"""

import argparse
import contextlib
import itertools
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lit_callbacks import ExactResume, VerifiedCheckpoint

SAMPLES, BATCH, EPOCHS = 40, 4, 3
MIDDLE, END = 14, 20
OURS, THEIRS = "ExactResume", "Lightning"


class Numbered(Dataset[tuple[int, Tensor]]):
    """Samples that say which they are."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.full((8,), index / SAMPLES)


class ByEpoch(Sampler[int]):
    """The order is a function of the epoch, as in DistributedSampler."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Small(LightningModule):
    """Dropout, and a schedule whose length the trainer is asked for."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 1))
        self.asks = asks

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Any."""
        return (self.net(batch[1]) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        """Reading ``estimated_stepping_batches`` here loses the position of a stateful loader (Lightning 20550)."""
        steps = int(self.trainer.estimated_stepping_batches) if self.asks else SAMPLES // BATCH * EPOCHS
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Record(Callback):
    """Which samples each batch has; the process dies in front of the batch ``dies_at``."""

    def __init__(self, dies_at: int | None) -> None:
        self.dies_at, self.seen = dies_at, list[tuple[int, list[int]]]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write down, or die."""
        if trainer.global_step == self.dies_at:
            raise KilledError
        self.seen.append((trainer.current_epoch, batch[0].tolist()))


class KilledError(BaseException):
    """As SIGKILL: nothing in memory is left."""


@dataclass(frozen=True)
class Outcome:
    """What came of a resume."""

    twice: int
    never: int
    same_order: bool
    identical: bool

    def __str__(self) -> str:
        if self.identical:
            return "**bit-identical**"
        return f"{self.twice} twice, {self.never} never" + ("; the order is right" if self.same_order else "")


def loader(cls: Any = DataLoader, own: bool = False, by_epoch: bool = False) -> Callable[[int], Any]:
    """A maker of training loaders."""

    def make(workers: int) -> Any:
        options: dict[str, Any] = {"sampler": ByEpoch()} if by_epoch else {"shuffle": True}
        if own:
            options["generator"] = torch.Generator().manual_seed(5)
        return cls(Numbered(), BATCH, num_workers=workers, **options)

    return make


LOADERS = {
    "DataLoader, shuffled": loader(),
    "DataLoader, a generator of its own": loader(own=True),
    "DataLoader, a sampler with `set_epoch`": loader(by_epoch=True),
    "StatefulDataLoader, shuffled": loader(StatefulDataLoader),
    "StatefulDataLoader, a generator of its own": loader(StatefulDataLoader, own=True),
    "StatefulDataLoader, a sampler with `set_epoch`": loader(StatefulDataLoader, by_epoch=True),
}


def fit(
    kind: str,
    folder: Path,
    make: Callable[[int], Any],
    workers: int,
    asks: bool,
    every: int,
    dies_at: int | None = None,
) -> tuple[Small, list[tuple[int, list[int]]]]:
    """Train, from the newest checkpoint if there is one."""
    torch.manual_seed(1 if dies_at is None or not any(folder.glob("*.ckpt")) else 2)
    record = Record(dies_at)
    options: dict[str, Any] = {"every_n_train_steps": every, "save_top_k": -1}
    saver = VerifiedCheckpoint if kind == OURS else ModelCheckpoint
    trainer = Trainer(
        accelerator="cpu", max_epochs=EPOCHS, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=0,
        callbacks=[*([ExactResume()] if kind == OURS else []), record, saver(folder, "{step}", **options)],
    )  # fmt: skip
    module = Small(asks)
    saved = sorted(folder.glob("*.ckpt"))
    with contextlib.suppress(KilledError):
        trainer.fit(module, make(workers), ckpt_path=str(saved[0]) if saved else None)
    return module, record.seen


def resumed(kind: str, make: Callable[[int], Any], workers: int, asks: bool, at: int, here: Path) -> Outcome:
    """Undisturbed, and killed and gone on with."""
    whole, order = fit(kind, here / "whole", make, workers, asks, every=1000)
    _, first = fit(kind, here / "killed", make, workers, asks, every=at, dies_at=at)
    module, rest = fit(kind, here / "killed", make, workers, asks, every=1000)
    shutil.rmtree(here / "whole", ignore_errors=True)
    shutil.rmtree(here / "killed", ignore_errors=True)
    seen = first[:at] + rest
    epoch = at // (SAMPLES // BATCH)
    ids = list(itertools.chain.from_iterable(ids for e, ids in seen if e == epoch))
    same = all(torch.equal(module.state_dict()[name], value) for name, value in whole.state_dict().items())
    return Outcome(len(ids) - len(set(ids)), SAMPLES - len(set(ids)), seen == order, same and seen == order)


def cases(quick: bool) -> Iterator[tuple[str, Callable[[int], Any], int, bool]]:
    """Name, loader, workers, whether the schedule asks for the number of steps."""
    for name, make in LOADERS.items():
        yield name, make, 0, False
        if not quick:
            yield f"{name}, 2 workers", make, 2, False
    for name in ("DataLoader, shuffled", "StatefulDataLoader, shuffled"):
        yield f"{name}, `estimated_stepping_batches` read", LOADERS[name], 0, True


def run(quick: bool) -> dict[str, dict[tuple[int, str], Outcome]]:
    """All outcomes by case, and by where and with what."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    here = Path(tempfile.mkdtemp(prefix="resume-"))
    try:
        return {
            name: {
                (at, kind): resumed(kind, make, workers, asks, at, here)
                for at in (MIDDLE, END)
                for kind in (THEIRS, OURS)
            }
            for name, make, workers, asks in cases(quick)
        }
    finally:
        shutil.rmtree(here)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without workers")
    results = run(parser.parse_args().quick)
    print(
        "| loader | mid-epoch, Lightning | mid-epoch, ours | epoch's end, Lightning | epoch's end, ours |\n"
        + "|---" * 5
        + "|"
    )
    for name, outcomes in results.items():
        print(f"| {name} | {' | '.join(str(outcome) for outcome in outcomes.values())} |")
    for kind in (THEIRS, OURS):
        found = [
            outcome.identical for outcomes in results.values() for (_, k), outcome in outcomes.items() if k == kind
        ]
        print(f"{kind}: {sum(found)} of {len(found)} bit-identical")


if __name__ == "__main__":
    main()
