"""Chaos: a run is killed with SIGKILL again and again until it finishes, and must equal the run that was not.

The run is `cli.py fit` of a small language model with dropout, all default callbacks, validations in the middle of
epochs, and a checkpoint every 10 steps. A supervisor starts it again with `--ckpt_path last` after every kill. Kills
come

- at instrumented points: in the middle of writing a checkpoint, after it was synced, after it was renamed and before
  its manifest, after its manifest and before older ones are deleted, between the two halves of a deletion, in the
  rehearsal, in a validation, at the start and at the end of an epoch, in the backward pass, in the middle of a line of
  metrics.csv;
- at random moments of the process's life, setting up and resuming included.

Compared with an undisturbed run, bit for bit: weights, optimizer and scheduler state, every line of metrics.csv but for
those that are times (throughput/), and which samples each step saw, also in steps that were made twice.

    python benchmarks/chaos.py                 # 60 kills, some three minutes on two cores
    python benchmarks/chaos.py --kills 20 --workers 2 --tmpdir /dev/shm

Processes are forked from one that has imported everything, because importing takes longer than the whole run.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import lit_transformer.commands.training  # noqa: F401 - the fork server imports it once
from lit_callbacks.checkpointing import newest_checkpoint
from lit_callbacks.markers import finished
from lit_transformer.cli import main as cli
from lit_transformer.run.metrics_file import MetricsFile

STEPS, EVERY = 60, 10
ARGUMENTS = """
    --config default --trainer.precision 32-true --trainer.accelerator cpu --trainer.enable_progress_bar false
    --trainer.max_steps {steps} --trainer.limit_train_batches 16 --trainer.val_check_interval 6
    --trainer.limit_val_batches 2 --trainer.num_sanity_val_steps 1 --trainer.log_every_n_steps 1
    --checkpoint_every_n_steps {every} --loss_curve null --data.init_args.block_size 32 --data.init_args.batch_size 4
    --model.init_args.config.d_model 16 --model.init_args.config.n_layers 2 --model.init_args.config.n_heads 2
    --model.init_args.config.ffn_dropout 0.1 --model.init_args.config.attention_dropout 0.1
"""
POINTS = (
    "writing", "synced", "renamed", "committed", "deleting", "validation", "validation_end", "epoch_start", "epoch_end",
    "backward", "batch_end", "logging", "rehearsal", "restored",
)  # fmt: skip


class Recorder(Callback):
    """Writes down which samples each step sees, and dies where it is told to."""

    def __init__(self) -> None:
        self.file = Path(os.environ["CHAOS_SAMPLES"]).open("a", encoding="utf-8")  # noqa: SIM115 - until the process dies
        self.point, self.after = os.environ["CHAOS_POINT"], int(os.environ["CHAOS_AFTER"])
        self.calls = 0

    def _maybe_die(self, point: str) -> None:
        if point == self.point:
            self.calls += 1
            if self.calls > self.after:
                die()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The samples of a batch."""
        self._maybe_die("restored")
        self.file.write(json.dumps([trainer.fit_loop.total_batch_idx, batch["sample_ids"].tolist()]) + "\n")
        self.file.flush()

    def on_after_backward(self, *_: Any) -> None:
        """Gradients are there, the step is not made."""
        self._maybe_die("backward")

    def on_train_batch_end(self, *_: Any) -> None:
        """The step is made, nothing of it is logged or saved."""
        self._maybe_die("batch_end")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """In a validation."""
        if not trainer.sanity_checking:
            self._maybe_die("validation")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        """Behind a validation, in front of a save that has waited for it."""
        if not trainer.sanity_checking:
            self._maybe_die("validation_end")

    def on_train_epoch_start(self, *_: Any) -> None:
        """In front of an epoch."""
        self._maybe_die("epoch_start")

    def on_train_epoch_end(self, *_: Any) -> None:
        """Behind an epoch."""
        self._maybe_die("epoch_end")


def die() -> None:
    """As the kernel does it when memory runs out, or a preemption is over."""
    os.kill(os.getpid(), signal.SIGKILL)


def instrument(point: str, after: int) -> None:
    """Let this process die inside a save, or in the middle of a line."""
    calls = 0

    def now(wanted: str) -> bool:
        nonlocal calls
        calls += wanted == point
        return wanted == point and calls > after

    save, replace, unlink, log = torch.save, Path.replace, Path.unlink, MetricsFile.log_metrics

    def torn_save(obj: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        path = getattr(file, "path", None)
        if path is not None and now("rehearsal" if "rehearsal" in path.name else "writing"):
            whole = io.BytesIO()
            save(obj, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            die()
        save(obj, file, *args, **kwargs)

    def watched_replace(self: Path, target: Any) -> Path:
        name = Path(target).name
        checkpoint = name.endswith(".ckpt") and not name.startswith((".", "last"))
        if checkpoint and now("synced"):
            die()
        result = replace(self, target)
        if checkpoint and now("renamed"):
            die()
        if name.endswith(".ckpt.manifest.json") and now("committed"):
            die()
        return result

    def watched_unlink(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok=missing_ok)
        if self.name.endswith(".ckpt") and not self.name.startswith(".") and now("deleting"):
            die()

    def torn_line(self: MetricsFile, metrics: Any, step: int | None = None) -> None:
        if now("logging"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{step},train/lo")
            die()
        log(self, metrics, step)

    torch.save = torn_save
    Path.replace, Path.unlink = watched_replace, watched_unlink  # type: ignore[method-assign,assignment]
    MetricsFile.log_metrics = functools.wraps(log)(torn_line)  # type: ignore[method-assign]


def attempt(folder: Path, workers: int, resume: bool, point: str, after: int, tmpdir: str | None) -> None:
    """One life of the process."""
    os.chdir(folder)
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # or loader workers start by importing everything
    os.environ |= {"CHAOS_SAMPLES": str(folder / "samples.jsonl"), "CHAOS_POINT": point, "CHAOS_AFTER": str(after)}
    os.environ.pop("LIT_TRANSFORMER_RUN", None)
    if tmpdir:
        os.environ["TMPDIR"] = tempfile.tempdir = tmpdir
    output = (folder / "output.txt").open("a", encoding="utf-8", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    instrument(point, after)
    words = [*ARGUMENTS.format(steps=STEPS, every=EVERY).split(), "--data.init_args.num_workers", str(workers)]
    words += ["--trainer.callbacks", json.dumps([{"class_path": "chaos.Recorder"}]), "--run", "chaos"]
    cli(["fit", *words, *(["--ckpt_path", "last"] if resume else [])])


def supervise(
    folder: Path, workers: int, kills: list[tuple[str, int]], tmpdir: str | None, seed: int
) -> dict[str, Any]:
    """Start the process again until it has finished, and kill it as planned."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chaos"])
    run, killed, lost, seconds = folder / "runs" / "chaos", 0, [], 4.0
    unused: list[str] = []
    groups: list[int | None] = []
    planned = list(kills)
    while not finished(run):
        point, after = planned.pop(0) if planned else ("", 0)
        before = newest(run)
        process = context.Process(target=attempt, args=(folder, workers, run.exists(), point, after, tmpdir))
        started = time.monotonic()
        process.start()
        groups.append(process.pid)
        process.join(draw.uniform(0, 1) * seconds if point == "random" else 300)
        if process.is_alive():
            process.kill()
            process.join()
            if point != "random":
                raise SystemExit(f"an attempt hangs:\n{(folder / 'output.txt').read_text()[-3000:]}")
        else:
            seconds = max(seconds, time.monotonic() - started)
        if process.exitcode == -signal.SIGKILL:
            killed += 1
            lost.append(reached(folder) - newest(run))
        elif process.exitcode != 0:
            raise SystemExit(
                f"an attempt ended with {process.exitcode}:\n{(folder / 'output.txt').read_text()[-3000:]}"
            )
        elif point and point != "random":
            unused.append(point)
        assert newest(run) >= before, "a kill has lost a checkpoint"
        if finished(run) and planned:  # go on killing, from the beginning of another run of the same kind
            break
    for group in groups:  # a worker whose parent dies right after the fork does not notice, and would wait for ever
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group or 0, signal.SIGKILL)
    return {"kills": killed, "lost": lost, "unused": unused, "left": planned}


def newest(run: Path) -> int:
    """The step that a resume would go on from."""
    point = newest_checkpoint([run / "checkpoints"])
    return 0 if point is None else point.manifest.step


def reached(folder: Path) -> int:
    """The number of batches that were begun, at the last count."""
    lines = (folder / "samples.jsonl").read_text().splitlines() if (folder / "samples.jsonl").exists() else []
    return int(json.loads(lines[-1])[0]) if lines else 0


def compare(expected: Path, actual: Path) -> list[str]:
    """What differs between two runs."""
    a, b = (torch.load(f / "runs/chaos/checkpoints/last.ckpt", weights_only=True) for f in (expected, actual))
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    differences = [part for part in parts if not same(a[part], b[part])]
    lines = [metrics(folder / "runs/chaos/metrics.csv") for folder in (expected, actual)]
    differences += sorted(f"metrics.csv: {line}" for line in lines[0] ^ lines[1])[:20]
    first, second = samples(expected), samples(actual)
    if first != second:
        differences.append("samples")
    return differences


def metrics(file: Path) -> set[str]:
    """The lines that do not tell the time; none of them twice."""
    lines = [line for line in file.read_text().splitlines() if "throughput/" not in line]
    twice = {line for line in lines if lines.count(line) > 1}
    assert not twice, f"{file}: {sorted(twice)[:5]} are there more than once"
    return set(lines)


def samples(folder: Path) -> dict[int, list[int]]:
    """The samples of each batch; a batch that was made again saw the same."""
    seen: dict[int, list[int]] = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        batch, ids = json.loads(line)
        assert seen.setdefault(batch, ids) == ids, f"batch {batch} saw {seen[batch]}, and {ids} when it was made again"
    return seen


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def plan(kills: int, seed: int) -> list[list[tuple[str, int]]]:
    """Kills for one run after another: every instrumented point, then random moments, a few to each run."""
    draw = random.Random(seed)
    every = [(point, draw.randint(0, 2)) for point in POINTS]
    every += [("random", 0)] * max(0, kills - len(every))
    draw.shuffle(every)
    return [every[i : i + 15] for i in range(0, kills, 15)]


def main() -> None:
    """Kill, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tmpdir", default=None, help="TMPDIR of the killed run, on another device for example")
    options = parser.parse_args()
    here = Path(tempfile.mkdtemp(prefix="chaos-"))
    results = kill_and_compare(here, options.kills, options.workers, options.seed, options.tmpdir)
    print(f"kills: {results['kills']}, runs: {results['runs']}, of {STEPS} steps with a checkpoint every {EVERY}")
    print(f"steps made again after a kill: at most {max(results['lost'])}, on average {mean(results['lost']):.1f}")
    print(f"differences from the undisturbed run: {results['differences'] or 'none'}")
    shutil.rmtree(here)
    sys.exit(bool(results["differences"]))


def kill_and_compare(here: Path, kills: int, workers: int, seed: int, tmpdir: str | None) -> dict[str, Any]:
    """Kill runs as planned, and compare each with the undisturbed one."""
    supervise(here / "undisturbed", workers, [], None, seed)
    total: dict[str, Any] = {"kills": 0, "runs": 0, "lost": [], "differences": [], "unused": []}
    waiting = [kill for part in plan(kills, seed) for kill in part]
    while total["kills"] < kills:
        folder = here / f"killed-{total['runs']}"
        result = supervise(folder, workers, waiting or [("random", 0)] * 10, tmpdir, seed + total["runs"])
        waiting = result["left"]
        total["kills"] += result["kills"]
        total["lost"] += result["lost"]
        total["unused"] += result["unused"]
        total["runs"] += 1
        total["differences"] += [f"{folder.name}: {found}" for found in compare(here / "undisturbed", folder)]
    return total


def mean(values: list[int]) -> float:
    """The average."""
    return sum(values) / len(values)


if __name__ == "__main__":
    import chaos  # under its own name, which the configuration and the fork server can import

    chaos.main()
