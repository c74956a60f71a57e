"""The same training under every strategy: what two processes do is what one does."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import two_ranks
from lit_transformer.cli import main
from strategy_worker import CASES, COMBINATIONS, fit
from tiny_config import CONFIG

slow = pytest.mark.slow
ZERO = ("zero1", "zero3", "zero2_offload", "zero3_offload")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i * i % 97:03d}, {i:04d}; " for i in range(4000)))
    return str(path)


@pytest.fixture(scope="module")
def single(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    found = {name: fit(folder / name, text, "single", **case) for name, case in CASES.items()}
    return found, folder / "plain" / "step=30.ckpt"


def launch(strategy, text, out, what="cases", checkpoint=""):
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return two_ranks(
        Path(__file__).with_name("strategy_worker.py"), out, strategy, strategy, text, what, str(checkpoint)
    )


def assert_same(name, ranks, alone, rounding):
    """Two processes have done what one does."""
    first, second = (rank[name] for rank in ranks)
    losses = {step: (loss + second["losses"][step]) / 2 for step, loss in first["losses"].items()}
    assert losses == pytest.approx(alone["losses"], rel=rounding, nan_ok=True), name
    assert first["weights"] == pytest.approx(alone["weights"], rel=rounding), name
    assert second["weights"] == first["weights"]
    assert first["position"] == alone["position"]
    assert first["logged"].keys() == alone["logged"].keys()
    for step, metrics in alone["logged"].items():
        found = first["logged"][step]
        assert found.keys() == metrics.keys(), (name, step)
        if rounding > 1e-5:
            continue
        assert found == pytest.approx(metrics, rel=1e-3, abs=1e-6, nan_ok=True), (name, step)
        exact = {k: v for k, v in metrics.items() if k.startswith("grad_norm/") or k == "param_norm/total"}
        for key, value in exact.items():
            assert found[key] == pytest.approx(value, rel=1e-5, nan_ok=True), (name, step, key)


@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp2", "zero2", *(pytest.param(z, marks=pytest.mark.slow) for z in ZERO)]
)
def test_two_ranks_do_what_one_process_does(strategy, single, text, tmp_path):
    alone, checkpoint = single
    ranks = launch(strategy, text, tmp_path, checkpoint=checkpoint)
    done = {name: {k: v for step in alone[name]["logged"].values() for k, v in step.items()} for name in alone}
    assert [done[name]["loss_spike/skipped_steps"] for name in ("plain", "nan", "wild")] == [0, 1, 1]
    assert done["damage"]["loss_spike/rollbacks"] == 1
    for name, case in alone.items():
        assert_same(name, ranks, case, 1e-2 if name == "bf16" else 1e-5)
    first, second = ranks
    resumed, plain = first["resumed"], first["plain"]
    assert resumed["losses"] == {step: loss for step, loss in plain["losses"].items() if int(step) >= 10}
    assert resumed["weights"] == plain["weights"]
    if strategy == "fsdp2":
        refused = first["refused"]
        assert "texts cannot be written under FSDP2: set scored_samples to 0" in refused["texts"]
        assert "keeps two sets of weights, which are not saved in parts yet" in refused["schedule_free"]
        assert "FSDP2 is for models of ours as yet" in refused["hugging_face"]
        assert "NonFiniteAutopsy serves a single device and DDP, but not yet FSDP2" in refused["autopsy"]
        assert "histograms=True) needs whole parameters" in refused["histograms"]
    if strategy.startswith("zero"):
        assert len(first["whole_gradients"]) == 3
        assert max(first["whole_gradients"]) < 1e-6
        # The data is that of the first steps, which cost 5.5 before training.
        mean = [(a + b) / 2 for a, b in zip(first["started_from"], second["started_from"], strict=True)]
        assert len(mean) == 2
        assert max(mean) < min(alone["plain"]["losses"].values()) + 0.3
        refused = first["refused"]
        assert "NonFiniteAutopsy serves a single device and DDP, but not yet CPUDeepSpeed" in refused["autopsy"]
        assert "AdaptiveGradientClipping serves a single device, DDP and FSDP2, but not" in refused["clipping"]
        assert "histograms=True) needs whole parameters" in refused["histograms"]
        assert "keeps two sets of weights, which are not saved in parts yet" in refused["schedule_free"]
        assert "an epoch has 3 batches and an optimizer step takes 2" in refused["window"]


@pytest.mark.slow
def test_every_combination_under_deepspeed(text, tmp_path):
    """Precision, accumulation and clipping."""
    alone = {name: fit(tmp_path / name, text, "single", **case) for name, case in COMBINATIONS.items()}
    for strategy in ("zero2", *ZERO):
        ranks = launch(strategy, text, tmp_path, "combinations")
        for name, case in alone.items():
            assert_same(name, ranks, case, 1e-2 if name.startswith("bf16") else 1e-5)


def test_without_deepspeed_a_run_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "default", "--config", "strategy/deepspeed_stage_2"])
    assert stop.value.code == 2
    assert "you must have DeepSpeed installed" in capsys.readouterr().err


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
