"""Interruptions: what a process says when its training was cut short, and what is left to go on from.

Each case is a process of its own that trains a tiny model, with Lightning's `ModelCheckpoint` every 4 steps, with
`save_on_exception` as well, and with `recommended()`, `VerifiedCheckpoint` every 4 steps, `GracefulShutdown` and a
shielded logger. Something happens at step 6 of 40: a signal, losses that are NaN from there on, a logger that raises,
an item that cannot be read, a loader's worker that dies. Noted are the exit code, and the step and the health of what a
resume with `last` goes on from.

Right is: an exit code other than 0 unless all 40 steps are made, and finite weights from step 6, or from the last
checkpoint before it where the process could not save at step 6 any more.

    python benchmarks/interruptions.py          # some three minutes
"""

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lit_callbacks import GracefulShutdown, VerifiedCheckpoint, recommended, shield

STEPS, AT, EVERY = 40, 6, 4
KINDS = ("ModelCheckpoint", "with save_on_exception", "ours")
OURS = KINDS[-1]
EVENTS = {
    "NaN losses": None,
    "SIGTERM": signal.SIGTERM,
    "SIGINT": signal.SIGINT,
    "SIGTERM while a batch hangs": signal.SIGTERM,
    "a logger raises": None,
    "an item cannot be read": None,
    "a worker dies": None,
}


class Numbers(Dataset[Tensor]):
    """Items, one of which is bad in the cases that ask for it."""

    def __init__(self, event: str) -> None:
        self.event = event

    def __len__(self) -> int:
        return STEPS * 4

    def __getitem__(self, index: int) -> Tensor:
        if index == AT * 4 + 8:  # loaders read ahead
            if self.event == "an item cannot be read":
                raise ValueError("item 32 cannot be read")
            if self.event == "a worker dies":
                os._exit(9)
        return torch.full((8,), index / 10)


class Small(LightningModule):
    """A regression."""

    def __init__(self, event: str) -> None:
        super().__init__()
        self.net, self.event = nn.Linear(8, 1), event

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """What goes wrong in a step."""
        if self.global_step == AT and self.event == "SIGTERM while a batch hangs":
            print("hanging", flush=True)
            time.sleep(600)
        loss = (self.net(batch) - 1).square().mean()
        self.log("loss", loss)
        return loss * math.nan if self.global_step >= AT and self.event == "NaN losses" else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any."""
        return torch.optim.AdamW(self.parameters(), lr=0.001)


class Broken(CSVLogger):
    """A logger whose service is gone."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Raise."""
        if step is not None and step >= AT:
            raise ConnectionError("the service is gone")
        super().log_metrics(metrics, step)


class Slow(Callback):
    """Gives the parent time to send its signal."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Say where training is."""
        print(f"step {trainer.global_step}", flush=True)
        time.sleep(0.02)


def trainer(
    kind: str, event: str, folder: Path, steps: int = STEPS
) -> tuple[Trainer, LightningModule, DataLoader[Tensor]]:
    """What is trained, with one of the three."""
    torch.manual_seed(0)
    callbacks: list[Callback]
    if kind == OURS:
        saver = VerifiedCheckpoint(folder, "{step}", every_n_train_steps=EVERY)
        callbacks = [*recommended(), saver, GracefulShutdown(grace_seconds=2.0)]
    else:
        exception = kind != KINDS[0]
        callbacks = [
            ModelCheckpoint(folder, "{step}", every_n_train_steps=EVERY, save_last=True, save_on_exception=exception)
        ]
    logger: Any = Broken(folder) if event == "a logger raises" else False
    made = Trainer(
        accelerator="cpu", max_steps=steps, default_root_dir=folder, enable_progress_bar=False, log_every_n_steps=1,
        enable_model_summary=False, callbacks=[*callbacks, Slow()],
        logger=shield(logger) if logger and kind == OURS else logger,
    )  # fmt: skip
    workers = 2 if event == "a worker dies" else 0
    return made, Small(event), DataLoader(Numbers(event), 4, num_workers=workers)


def child(kind: str, event: str, folder: Path) -> None:
    """The process that something happens to."""
    made, module, loader = trainer(kind, event, folder)
    made.fit(module, loader)


class Look(Callback):
    """Where a resume stands, and whether its weights are finite."""

    found: tuple[int, bool] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, and go no further."""
        self.found = (trainer.global_step, all(bool(p.isfinite().all()) for p in pl_module.parameters()))
        raise KeyboardInterrupt


def resumed(kind: str, folder: Path) -> tuple[int, bool]:
    """The step that `last` goes on from, and whether that is healthy."""
    look = Look()
    made, module, loader = trainer(kind, "", folder, STEPS + 1)
    made.callbacks.insert(0, look)  # type: ignore[attr-defined]
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        made.fit(module, loader, ckpt_path="last")
    assert look.found is not None
    return look.found


def interrupt(kind: str, event: str, folder: Path) -> tuple[int | str, int, bool]:
    """Exit code, step of the resume, health of the resume."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps([kind, event, str(folder)])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    if (number := EVENTS[event]) is not None:
        for line in process.stdout:
            if line.strip() == ("hanging" if event.endswith("hangs") else f"step {AT}"):
                process.send_signal(number)
                break
    code: int | str
    try:
        process.communicate(timeout=20)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        code = "hangs until SIGKILL"
    return code, *resumed(kind, folder)


def right(event: str, code: int | str, step: int, finite: bool) -> bool:
    """Whether the process tells the truth, and no good step is lost that could have been saved."""
    if not finite or code == "hangs until SIGKILL":
        return False
    if step == STEPS or event == "a logger raises":
        return code == 0 and step == STEPS
    return code != 0 and step >= (AT if event in ("SIGTERM", "SIGINT") else EVERY)


def run(kinds: tuple[str, ...] = KINDS) -> dict[str, dict[str, tuple[int | str, int, bool]]]:
    """All events, with all three."""
    logging.getLogger("lightning.pytorch").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, tuple[int | str, int, bool]]] = {}
    with tempfile.TemporaryDirectory(prefix="interruptions-") as here:
        for event in EVENTS:
            for kind in kinds:
                folder = Path(here) / event.replace(" ", "-") / kind.replace(" ", "-")
                results.setdefault(event, {})[kind] = interrupt(kind, event, folder)
    return results


def main() -> None:
    """Interrupt, resume, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    if words := parser.parse_args().child:
        kind, event, folder = json.loads(words)
        child(kind, event, Path(folder))
        return
    results = run()
    print(f"| at step {AT} of {STEPS} | {' | '.join(KINDS)} |\n" + "|---" * (1 + len(KINDS)) + "|")
    for event, kinds in results.items():
        print(f"| {event} | {' | '.join(_cell(event, *kinds[kind]) for kind in KINDS)} |")
    counts = [f"{kind} {sum(not right(event, *kinds[kind]) for event, kinds in results.items())}" for kind in KINDS]
    print(f"\nwrong, of {len(results)}: {', '.join(counts)}")


def _cell(event: str, code: int | str, step: int, finite: bool) -> str:
    end = code if isinstance(code, str) else f"code {code}"
    rest = "all steps made" if step == STEPS else f"goes on from step {step}"
    text = f"{end}; {rest}{'' if finite else ' with NaN weights'}"
    return f"**{text}**" if right(event, code, step, finite) else text


if __name__ == "__main__":
    main()
