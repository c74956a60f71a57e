"""Run by test_reliability_ddp.py in two processes: checkpoints, resumes and shutdowns of one run on two ranks."""

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

sys.path.append(str(Path(__file__).parent))

from test_exact_resume import PLACES, Kill, Killed, NoValidation, Numbers, Record, Small, saving

import lit_callbacks.checkpointing.atomic_checkpoint_io as atomic
from helpers import MemoryLogger, make_trainer
from lit_callbacks import (
    CheckpointError,
    EarlyStoppingWithRestore,
    ExactResume,
    GracefulExit,
    GracefulShutdown,
    VerifiedCheckpoint,
)
from lit_callbacks.checkpointing import committed

RANK = int(os.environ.get("RANK", 0))


class SignalHere(Callback):
    """One rank alone gets a signal."""

    def __init__(self, rank, hook, n):
        self.rank, self.left = rank, n
        setattr(self, hook, self._count)

    def _count(self, *_):
        self.left -= 1
        if self.left == 0 and self.rank == RANK:
            signal.raise_signal(signal.SIGTERM)


def fit(folder, *callbacks, resume=None, place="middle", workers=0, accumulate=1, seed=0, **options):
    torch.manual_seed(seed + RANK)
    random.seed(seed + RANK)
    numpy.random.seed(seed + RANK)  # noqa: NPY002 - what people use
    module, record, logger = Small(), Record(), MemoryLogger()
    checkpoint = VerifiedCheckpoint(folder, "{step}", save_top_k=-1, **saving(place, accumulate))
    trainer = make_trainer(
        strategy="ddp", devices=2, enable_checkpointing=True, default_root_dir=folder, logger=logger, max_epochs=3,
        accumulate_grad_batches=accumulate, num_sanity_val_steps=0, val_check_interval=5,
        callbacks=[GracefulShutdown(), ExactResume(), *callbacks, record, checkpoint], **options,
    )  # fmt: skip
    train = DataLoader(Numbers(80, augment=True), 4, shuffle=True, num_workers=workers)
    ended = None
    try:
        trainer.fit(module, train, DataLoader(Numbers(24), 4), ckpt_path=resume)
    except (Killed, GracefulExit, CheckpointError) as error:
        ended = error
    values = [module.state_dict(), [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]]
    digest = hashlib.sha256(repr(tree(values)).encode()).hexdigest()
    rows = sorted((step, key, value) for step, values in logger.calls for key, value in values.items())
    return {
        "digest": digest, "seen": record.seen, "rows": rows, "step": trainer.global_step, "ended": repr(ended),
        "code": getattr(ended, "code", None), "message": str(ended),
    }  # fmt: skip


def tree(values):
    if isinstance(values, torch.Tensor):
        return values.tolist()
    if isinstance(values, dict):
        return {str(key): tree(value) for key, value in values.items()}
    return [tree(value) for value in values] if isinstance(values, list) else values


def fail_on_rank_zero(calls):
    save, seen = torch.save, []

    def sometimes(obj, file, *args, **kwargs):
        if hasattr(file, "path") and "rehearsal" not in file.path.name:  # not what ranks send to each other
            seen.append(file.path)
            if len(seen) in calls:
                raise OSError(28, "No space left on device")
        save(obj, file, *args, **kwargs)

    atomic.torch.save = sometimes
    return lambda: setattr(atomic.torch, "save", save)


GRID = {
    f"{place}-{workers}-{accumulate}": {"place": place, "workers": workers, "accumulate": accumulate}
    for place in PLACES
    for workers in (0, 2)
    for accumulate in (1, 4)
}
CORNERS = ("middle-0-1", "last-2-1", "behind-0-4")
REST = [name for name in GRID if name not in CORNERS]


def resumed(out, names):
    """Undisturbed, killed, and gone on with."""
    found = {}
    for name in names:
        options = GRID[name]
        found[f"whole-{name}"] = fit(out / f"whole-{name}", **options)
        found[f"first-{name}"] = fit(out / f"killed-{name}", Kill("on_train_batch_start", 19), **options)
        found[f"rest-{name}"] = fit(out / f"killed-{name}", resume="last", seed=77, **options)
    return found


def main(out, part):
    found = resumed(out, CORNERS if part == "corners" else REST)
    if part == "corners":
        found |= signalled(out) | failing(out) | {"early": early(out)}
    (out / f"rank_{RANK}.json").write_text(json.dumps(found))


def signalled(out):
    found = {}
    found["shut-first"] = fit(out / "shut", SignalHere(1, "on_train_batch_start", 13))
    found["shut-rest"] = fit(out / "shut", resume="last", seed=77)
    found["shut-validation-first"] = fit(out / "shut-validation", SignalHere(1, "on_validation_batch_start", 5))
    found["shut-validation-rest"] = fit(out / "shut-validation", resume="last", seed=77)
    return found


def failing(out):
    found = {}
    undo = fail_on_rank_zero({2})
    found["failing"] = fit(out / "failing")
    undo()
    undo = fail_on_rank_zero({2, 3, 4})
    found["failed"] = fit(out / "failed")
    undo()
    if RANK == 0:
        found["kept"] = {name: [kept.manifest.step for kept in committed(out / name)] for name in ("failing", "failed")}
    return found


class Disagree(NoValidation):
    """The loss rises on rank zero and falls on rank one."""

    def validation_step(self, batch, batch_idx):
        loss = float(self.trainer.global_step)
        self.log("val/loss", loss if RANK == 0 else -loss)


def early(out):
    torch.manual_seed(0)
    callback, module = EarlyStoppingWithRestore(patience=2), Disagree()
    trainer = make_trainer(
        strategy="ddp", devices=2, max_epochs=3, val_check_interval=5, num_sanity_val_steps=0,
        callbacks=[callback], default_root_dir=out,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Numbers(80), 4, shuffle=True), DataLoader(Numbers(24), 4))
    digest = hashlib.sha256(repr(tree(module.state_dict())).encode()).hexdigest()
    return {"step": trainer.global_step, "best": [callback.best_step, callback.best_value], "digest": digest}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
