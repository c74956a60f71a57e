"""The same training under every strategy: what two processes do is what one does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from helpers import run_ranks
from lit_transformer.commands.consolidate import whole as consolidated
from strategy_worker import CASES, fit
from tiny_config import CONFIG


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i * i % 97:03d}, {i:04d}; " for i in range(4000)))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("single")


@pytest.fixture(scope="module")
def single(text, folder):
    return {name: fit(folder / name, text, "single", **case) for name, case in CASES.items()}


@pytest.mark.parametrize(
    ("strategy", "n"),
    [
        ("ddp", 2),
        ("fsdp2", 2),
        ("tensor_parallel", 2),
        pytest.param("tensor_parallel_and_fsdp2", 4, marks=pytest.mark.slow),
    ],
)
def test_several_ranks_do_what_one_process_does(strategy, n, single, folder, text, tmp_path):
    saved = folder / "plain" / "step=10.ckpt"
    ranks = run_ranks(
        Path(__file__).with_name("strategy_worker.py"), tmp_path, strategy, strategy, text, saved, n=n, timeout=480
    )
    first, second = ranks[0], ranks[-1]
    for name, alone in single.items():
        together = first[name]
        losses = {step: (loss + second[name]["losses"][step]) / 2 for step, loss in together["losses"].items()}
        rounding = 1e-2 if name == "bf16" else 1e-5
        assert losses == pytest.approx(alone["losses"], rel=rounding, nan_ok=True), name
        assert together["weights"] == pytest.approx(alone["weights"], rel=rounding), name
        assert second[name]["weights"] == together["weights"]
        assert together["position"] == alone["position"]
        assert together["logged"].keys() == alone["logged"].keys()
        for step, metrics in alone["logged"].items() if name != "bf16" else ():
            found = together["logged"][step]
            assert found == pytest.approx(metrics, rel=1e-3, abs=1e-6, nan_ok=True), (name, step)
            for key in metrics.keys() & {"grad_norm/total", "grad_norm/clipped", "param_norm/total"}:
                assert found[key] == pytest.approx(metrics[key], rel=1e-5, nan_ok=True), (name, step, key)
    if strategy == "fsdp2":
        refused = first["refused"]
        assert "texts cannot be written under FSDP2: set scored_samples to 0" in refused["texts"]
        assert "keeps two sets of weights, which are not saved in parts yet" in refused["schedule_free"]
        assert "FSDP2 is for models of ours as yet" in refused["hugging_face"]
        assert "NonFiniteAutopsy serves a single device and DDP, but not yet FSDP2" in refused["autopsy"]
        assert "histograms=True) needs whole parameters" in refused["histograms"]
    if strategy == "tensor_parallel":  # what all devices compute, they drop alike
        assert first["dropout"] == second["dropout"]
    resumed, whole = first["resumed"], first["plain"]
    assert resumed["losses"] == {step: loss for step, loss in whole["losses"].items() if int(step) >= 10}
    assert resumed["weights"] == whole["weights"]
    if strategy != "ddp":
        from_one_file = {step: loss for step, loss in whole["losses"].items() if 10 <= int(step) < 15}
        assert first["from_one_file"]["losses"] == pytest.approx(from_one_file, rel=1e-5)
        parts = consolidated(tmp_path / "plain" / "step=30.ckpt")
        one = torch.load(folder / "plain" / "step=30.ckpt", weights_only=True)
        assert parts["state_dict"].keys() == one["state_dict"].keys()
        for name, weight in one["state_dict"].items():
            torch.testing.assert_close(parts["state_dict"][name], weight, rtol=1e-4, atol=1e-6)
        for theirs, ours in zip(parts["optimizer_states"], one["optimizer_states"], strict=True):
            for number, state in ours["state"].items():
                for key, value in state.items():
                    torch.testing.assert_close(theirs["state"][number][key], value, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "tensor_parallel"])
def test_sharded_on_the_command_line(strategy, tmp_path):
    """Fit, go on, make one file of the parts, and go on from that on one device."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"checkpoint_every_n_steps": 10}))
    (tmp_path / "text.txt").write_text("".join(f"{i * i % 97:03d}, {i:04d}; " for i in range(4000)))
    sharded = ["--config", "tiny.yaml", "--config", f"strategy/{strategy}", "--trainer.devices", "2"]

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
