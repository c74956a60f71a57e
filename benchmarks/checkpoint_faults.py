"""Checkpoint faults: the newest checkpoint is damaged in every way we know, and the run is resumed with `last`.

Each case really happens, to a tiny model in a temporary folder that holds the checkpoints of steps 5, 10 and 15, once
with Lightning's `ModelCheckpoint(save_last=True)` and once with `VerifiedCheckpoint`. Right is to go on, with exactly
the weights that were saved, from the newest checkpoint that is undamaged or whose damage does not matter, or to stop
with an error where there is none.

    python benchmarks/checkpoint_faults.py            # all, some 30 s
    python benchmarks/checkpoint_faults.py --quick    # every fifth cut and flip

Cases that need a file system of their own are left out where none may be mounted.
"""

import argparse
import contextlib
import logging
import os
import shutil
import subprocess
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_callbacks import CheckpointError, SetupError, VerifiedCheckpoint

STEPS = (5, 10, 15)
OURS, THEIRS = "VerifiedCheckpoint", "ModelCheckpoint"
RIGHT, WRONG = "right", "wrong"


class Small(LightningModule):
    """Some 5,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """A regression onto the input."""
        return (self.net(batch[0]) - batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any."""
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Look(Callback):
    """The weights after a resume, before the first step."""

    def __init__(self) -> None:
        self.step = -1
        self.weights: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy them."""
        self.step = trainer.global_step
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


class Do(Callback):
    """Something at the beginning of one step."""

    def __init__(self, step: int, act: Callable[[LightningModule], None]) -> None:
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Do it."""
        if trainer.global_step == self.step:
            self.act(pl_module)


def fit(
    kind: str, folder: Path, steps: int, resume: str | None = None, callbacks: list[Callback] | None = None
) -> None:
    """Train with one of the two."""
    torch.manual_seed(0)
    saver = (
        VerifiedCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)
        if kind == OURS
        else ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1, save_last=True)
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[*(callbacks or []), saver],
    )  # fmt: skip
    trainer.fit(Small(), DataLoader(TensorDataset(torch.randn(256, 32)), batch_size=8), ckpt_path=resume)


def newest(kind: str, folder: Path) -> Path:
    """The file that a resume would take."""
    return folder / ("step=15.ckpt" if kind == OURS else "last.ckpt")


def resume(kind: str, folder: Path, expected: int | None, truth: dict[int, dict[str, Tensor]]) -> tuple[str, str]:
    """Whether a resume does the right thing, and what it does. With None, an error is right."""
    look = Look()
    try:
        fit(kind, folder, 16, "last", [look])
    except (CheckpointError, SetupError) as error:
        return (RIGHT if expected is None else WRONG), f"stops: {str(error).splitlines()[0].partition(', so')[0]}"
    except Exception as error:
        return (RIGHT if expected is None else WRONG), f"dies with {type(error).__name__}"
    if look.step not in truth:
        return WRONG, f"goes on from step {look.step}, silently"
    same = all(torch.equal(look.weights[name], value) for name, value in truth[look.step].items())
    if not same:
        return WRONG, "loads changed weights, silently"
    if expected is None or look.step < expected:
        return WRONG, f"goes on from step {look.step}, though {expected} is good"
    return RIGHT, f"goes on from step {look.step}"


def cut(share: float) -> Callable[[str, Path], None]:
    """Keep only the beginning of the newest file."""

    def damage(kind: str, folder: Path) -> None:
        path = newest(kind, folder)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return damage


def flip(region: str, part: float) -> Callable[[str, Path], None]:
    """Flip one bit in a region of the newest file."""

    def damage(kind: str, folder: Path) -> None:
        path = newest(kind, folder)
        data = bytearray(path.read_bytes())
        start, end = regions(path)[region]
        at = start + int(part * (end - start - 1))
        data[at] ^= 0x40
        path.write_bytes(data)

    return damage


def regions(path: Path) -> dict[str, tuple[int, int]]:
    """Where in the file what is."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        pickled = next(info for info in infos if info.filename.endswith("data.pkl"))
        largest = max(infos, key=lambda info: info.file_size if "/data/" in info.filename else 0)
        directory = archive.start_dir
    size = path.stat().st_size
    return {
        "local header": (largest.header_offset, largest.header_offset + 30),
        "pickle": _content(path, pickled),
        "tensor": _content(path, largest),
        "directory": (directory, size - 22),
        "end record": (size - 22, size),
    }


def _content(path: Path, info: zipfile.ZipInfo) -> tuple[int, int]:
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    start = info.header_offset + 30 + name + extra
    return start, start + info.file_size


def _shorten(kind: str, folder: Path) -> None:
    path = newest(kind, folder)
    path.write_bytes(path.read_bytes()[:-10])


def _remove(kind: str, folder: Path) -> None:
    newest(kind, folder).unlink()


def _dangle(kind: str, folder: Path) -> None:
    path = newest(kind, folder)
    path.unlink()
    path.symlink_to("gone.ckpt")


def _older_in_the_future(kind: str, folder: Path) -> None:
    name = "last-v1.ckpt" if kind == THEIRS else "step=5.ckpt"
    if kind == THEIRS:
        shutil.copy(folder / "step=5.ckpt", folder / name)
    os.utime(folder / name, (4e9, 4e9))


def _overwritten_by_an_older_one(kind: str, folder: Path) -> None:
    shutil.copy(folder / "step=5.ckpt", newest(kind, folder))


def _two_damaged(kind: str, folder: Path) -> None:
    cut(0.5)(kind, folder)
    path = folder / "step=10.ckpt"
    path.write_bytes(path.read_bytes()[:1000])


def _all_but_a_foreign_file(kind: str, folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "epoch=3.ckpt").write_bytes(b"from somewhere else")


def _all_damaged(kind: str, folder: Path) -> None:
    for path in folder.glob("*.ckpt"):
        if not path.is_symlink():
            path.write_bytes(path.read_bytes()[:-10])


def cases(quick: bool) -> Iterator[tuple[str, Callable[[str, Path], None], int | None]]:
    """Name of a group, damage, and the step that a resume has to go on from."""
    for i in range(1, 20, 5 if quick else 1):
        yield "truncated at 5 %, 10 %, … 95 %", cut(i / 20), 10
    for region in ("local header", "pickle", "tensor", "directory", "end record"):
        for part in (0.5,) if quick else (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
            yield f"one bit flipped: {region}", flip(region, part), 10
    yield "empty", cut(0.0), 10
    yield "ten bytes short", _shorten, 10
    yield "gone", _remove, 10
    yield "a dangling link", _dangle, 10
    yield "an older one has a time in the future", _older_in_the_future, 15
    yield "overwritten by an older one", _overwritten_by_an_older_one, 10
    yield "the two newest damaged", _two_damaged, 5
    yield "all gone but a foreign file", _all_but_a_foreign_file, None
    yield "all damaged", _all_damaged, None


def run_damaged(quick: bool, here: Path) -> dict[str, dict[str, Counter[tuple[str, str]]]]:
    """Outcomes by group and by kind."""
    results: dict[str, dict[str, Counter[tuple[str, str]]]] = {}
    for kind in (THEIRS, OURS):
        whole = here / kind
        fit(kind, whole, 15)
        truth = {step: _weights(whole / f"step={step}.ckpt") for step in STEPS}
        for name, damage, expected in cases(quick):
            folder = here / "case"
            shutil.copytree(whole, folder, symlinks=True)
            damage(kind, folder)
            outcome = resume(kind, folder, expected, truth)
            results.setdefault(name, {}).setdefault(kind, Counter())[outcome] += 1
            shutil.rmtree(folder)
    return results


def run_while_saving(here: Path) -> dict[str, dict[str, Counter[tuple[str, str]]]]:
    """Faults while the run is under way."""
    results: dict[str, dict[str, Counter[tuple[str, str]]]] = {}

    def poison(module: LightningModule) -> None:
        next(module.parameters()).data.view(-1)[0] = torch.nan

    for kind in (THEIRS, OURS):
        folder = here / f"nan-{kind}"
        fit(kind, folder, 15, callbacks=[Do(12, poison)])
        truth = {step: _weights(path) for step in (5, 10) if (path := folder / f"step={step}.ckpt").exists()}
        results.setdefault("NaN weights at the last save", {})[kind] = Counter([resume(kind, folder, 10, truth)])
        with tmpfs(here / f"full-{kind}") as folder_:
            if folder_ is None:
                continue
            outcome = _with_a_full_disk(kind, folder_)
            results.setdefault("disk full at the second of three saves", {})[kind] = Counter([outcome])
        with tmpfs(here / f"read-only-{kind}") as folder_:
            if folder_ is not None:
                subprocess.run(["mount", "-o", "remount,ro", folder_], check=True)
                outcome = _with_a_read_only_folder(kind, folder_)
                results.setdefault("the folder is read-only", {})[kind] = Counter([outcome])
    return results


def _with_a_full_disk(kind: str, folder: Path) -> tuple[str, str]:
    ballast = folder / "ballast"

    def fill(module: LightningModule) -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)

    try:
        fit(kind, folder / "ck", 15, callbacks=[Do(8, fill), Do(12, lambda _: ballast.unlink())])
    except Exception as error:
        empty = [path.name for path in (folder / "ck").glob("*.ckpt") if path.stat().st_size == 0]
        left = f", and leaves an empty {empty[0]}" if empty else ""
        return WRONG, f"dies with {type(error).__name__}{left}"
    truth = {step: _weights(path) for step in STEPS if (path := folder / "ck" / f"step={step}.ckpt").exists()}
    right, what = resume(kind, folder / "ck", 15, truth)
    return right, f"trains on; {what}"


def _with_a_read_only_folder(kind: str, folder: Path) -> tuple[str, str]:
    look = Look()
    try:
        fit(kind, folder / "ck", 15, callbacks=[look])
    except SetupError:
        return RIGHT, "refused before the first step"
    except Exception as error:
        return WRONG, f"dies with {type(error).__name__} at the first save"
    return WRONG, "trains on without any checkpoint"


@contextlib.contextmanager
def tmpfs(folder: Path) -> Iterator[Path | None]:
    """A file system of 2 MB in memory, or None where it may not be mounted."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(options, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _weights(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return weights


def run(quick: bool) -> dict[str, dict[str, Counter[tuple[str, str]]]]:
    """All cases."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    here = Path(tempfile.mkdtemp(prefix="checkpoint-faults-"))
    try:
        return run_damaged(quick, here) | run_while_saving(here)
    finally:
        shutil.rmtree(here, ignore_errors=True)


def wrong(results: dict[str, dict[str, Counter[tuple[str, str]]]], kind: str) -> int:
    """How many cases of a kind went wrong."""
    return sum(n for kinds in results.values() for (verdict, _), n in kinds[kind].items() if verdict == WRONG)


def main() -> None:
    """Damage, resume, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    results = run(parser.parse_args().quick)
    print(f"| the newest checkpoint | cases | {THEIRS}, `last` | {OURS}, `last` |\n|---|---|---|---|")
    for name, kinds in results.items():
        cells = [_cell(kinds[kind]) for kind in (THEIRS, OURS)]
        print(f"| {name} | {kinds[OURS].total()} | {cells[0]} | {cells[1]} |")
    total = sum(kinds[OURS].total() for kinds in results.values())
    print(f"\nwrong, of {total}: {THEIRS} {wrong(results, THEIRS)}, {OURS} {wrong(results, OURS)}")


def _cell(outcomes: Counter[tuple[str, str]]) -> str:
    many = outcomes.total() > 1
    parts = [f"{f'{n}x ' if many else ''}{what}" for (_, what), n in outcomes.most_common()]
    right = all(verdict == RIGHT for verdict, _ in outcomes)
    return f"**{'; '.join(parts)}**" if right else "; ".join(parts)


if __name__ == "__main__":
    main()
