"""The same training under every strategy: what two processes do is what one does."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import strategy_worker
from helpers import two_ranks
from lit_transformer.memory import Load, held_by, optimizer_states, uses
from strategy_worker import CASES, Task, fit
from tiny_config import CONFIG


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i * i % 97:03d}, {i:04d}; " for i in range(4000)))
    return str(path)


@pytest.fixture(scope="module")
def single(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return {name: fit(folder / name, text, "single", **case) for name, case in CASES.items()}


def load():
    """What `fit` of the worker has to hold, counted on nothing, with one snapshot."""
    with torch.device("meta"):
        task = Task(strategy_worker.CONFIG, partial(torch.optim.AdamW, lr=3e-3), schedule=None)
    states = optimizer_states(task.optimizer_factory, task.groups_to_train())
    return Load(held_by(task, states), activations=None, keep_snapshots=1)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_do_what_one_process_does(strategy, single, text, tmp_path):
    ranks = two_ranks(Path(__file__).with_name("strategy_worker.py"), tmp_path, strategy, strategy, text)
    first, second = ranks
    for name, alone in single.items():
        together = first[name]
        losses = {step: (loss + second[name]["losses"][step]) / 2 for step, loss in together["losses"].items()}
        rounding = {"bf16": 1e-2, "fp16": 1e-3}.get(name, 1e-5)
        assert losses == pytest.approx(alone["losses"], rel=rounding, nan_ok=True), name
        assert together["weights"] == pytest.approx(alone["weights"], rel=rounding), name
        assert second[name]["weights"] == together["weights"]
        assert together["position"] == alone["position"]
        assert second[name]["scale"] == together["scale"] == alone["scale"]
        assert together["logged"].keys() == alone["logged"].keys()
        for step, metrics in alone["logged"].items() if name not in ("bf16", "fp16") else ():
            found = together["logged"][step]
            assert found == pytest.approx(metrics, rel=1e-3, abs=1e-6, nan_ok=True), (name, step)
            for key in metrics.keys() & {"grad_norm/total", "grad_norm/clipped", "param_norm/total"}:
                assert found[key] == pytest.approx(metrics[key], rel=1e-5, nan_ok=True), (name, step, key)
    if strategy == "fsdp2":
        refused = first["refused"]
        assert "NonFiniteAutopsy serves a single device and DDP, but not yet FSDP2" in refused["autopsy"]
        assert "histograms=True) needs whole parameters" in refused["histograms"]
    for held, name in ((single["plain"]["bytes"], "one device"), (first["plain"]["bytes"], strategy)):
        counted = next(use for use in uses(load(), devices=2) if use.strategy == name)
        assert (counted.parameters, counted.gradients, counted.states) == tuple(
            held[what] for what in ("parameters", "gradients", "states")
        )
        assert [counted.snapshots] * 5 == held["snapshots"], name
    resumed, whole = first["resumed"], first["plain"]
    assert resumed["losses"] == {step: loss for step, loss in whole["losses"].items() if int(step) >= 10}
    assert resumed["weights"] == whole["weights"]


@pytest.mark.slow
def test_sharded_on_the_command_line(tmp_path):
    """Fit, go on, make one file of the parts, and go on from that on one device."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"checkpoint_every_n_steps": 10}))
    (tmp_path / "text.txt").write_text("".join(f"{i * i % 97:03d}, {i:04d}; " for i in range(4000)))
    sharded = ["--config", "tiny.yaml", "--config", "strategy/fsdp2", "--trainer.devices", "2"]

    def run(*words):
        command = [sys.executable, "-W", "ignore", Path(__file__).parents[1] / "cli.py", *words]
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True, timeout=240
        )
        return done.stdout + done.stderr

    assert "Trained to step 20" in run("fit", *sharded, "--run", "a")
    last = tmp_path / "runs" / "a" / "checkpoints" / "last.ckpt"
    assert "is in parts, as a sharded strategy saves it" in run(
        "validate", "--config", "tiny.yaml", "--ckpt_path", str(last)
    )
    assert "Going on from step 20" in run(
        "fit", *sharded, "--run", "a", "--ckpt_path", "last", "--trainer.max_steps=25"
    )
    assert "consolidate needs a file to write to" in run("consolidate", "--run", "a")
    assert "Consolidated" in run("consolidate", "--run", "a", "--to", "whole.ckpt")
    assert "whole.ckpt exists already" in run("consolidate", "--run", "a", "--to", "whole.ckpt")
    assert "is one file already" in run("consolidate", "--ckpt_path", "whole.ckpt", "--to", "b.ckpt")
    sides = {}
    for name, words in (("parts", [*sharded, "--ckpt_path", str(last)]), ("whole", ["--config", "tiny.yaml"])):
        words = words if name == "parts" else [*words, "--ckpt_path", "whole.ckpt"]
        found = run("validate", *words, "--trainer.limit_val_batches=1.0")
        sides[name] = float(re.search(r"val/loss +([0-9.]+)", found)[1])
    assert sides["whole"] == pytest.approx(sides["parts"], abs=1e-4)
    assert "Trained to step 30" in run(
        "fit", "--config", "tiny.yaml", "--run", "b", "--ckpt_path", "whole.ckpt", "--trainer.max_steps=30"
    )
    assert "Trained to step 30" in run(
        "fit", *sharded, "--run", "c", "--ckpt_path", "whole.ckpt", "--trainer.max_steps=30"
    )
