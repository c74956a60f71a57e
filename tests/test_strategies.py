"""The same training under every strategy: what two processes do is what one does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import yaml

import strategy_worker
from helpers import run_ranks
from lit_transformer.cli import main
from lit_transformer.commands.consolidate import whole as consolidated
from lit_transformer.strategies.memory import Load, held_by, optimizer_states, uses
from strategy_worker import GRID, STRATEGIES, Cell, Task, adaptively_clipped, resumed_part
from tiny_config import CONFIG


@pytest.fixture(scope="module")
def single(text, tmp_path_factory):
    """What one process gives for a cell."""
    folder = tmp_path_factory.mktemp("single")

    @cache
    def run(number):
        found = GRID[number].run(folder, text, "single")
        if GRID[number].precision == "16-mixed":  # what overflows is the scaler's to skip
            assert [30, "skip"] in found["events"]
            assert found["scale"] != 1024
        else:
            assert found["events"] == [[12, "skip"], [26, "skip"], [30, "skip"], [31, "skip"], [32, "rollback"]]
        return found

    run.folder = folder
    run.clipped = cache(lambda: adaptively_clipped(folder / "clipped", text, "single"))
    return run


def load():
    """What `fit` of the worker has to hold, counted on nothing, with one snapshot."""
    with torch.device("meta"):
        task = Task(strategy_worker.CONFIG, partial(torch.optim.AdamW, lr=3e-3), schedule=None)
    states = optimizer_states(task.optimizer_factory, task.groups_to_train())
    return Load(held_by(task, states), activations=None, keep_snapshots=1)


def compare(strategy, numbers, single, text, tmp_path, one_file=""):
    """Several ranks against one process; what the first and the last rank found."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="pip install 'lit-transformer[deepspeed]'")
    numbers = [str(number) for number in numbers]
    worker, n = Path(__file__).with_name("strategy_worker.py"), STRATEGIES[strategy][0]
    ranks = run_ranks(worker, tmp_path, strategy, strategy, text, one_file, *numbers, n=n, timeout=480)
    first, second = ranks[0], ranks[-1]
    for cell, alone in {str(GRID[int(number)]): single(int(number)) for number in numbers}.items():
        together = first[cell]
        losses = {step: (loss + second[cell]["losses"][step]) / 2 for step, loss in together["losses"].items()}
        rounding = 1e-2 if "bf16" in cell else 1e-3 if "16" in cell else 1e-5
        assert losses == pytest.approx(alone["losses"], rel=rounding, nan_ok=True), cell
        assert together["weights"] == pytest.approx(alone["weights"], rel=rounding), cell
        assert second[cell]["weights"] == together["weights"]
        assert together["position"] == alone["position"]
        assert second[cell]["scale"] == together["scale"] == alone["scale"]
        assert together["events"] == alone["events"], cell
        assert together["resumed"] == resumed_part(together), cell
        assert together["logged"].keys() == alone["logged"].keys()
        for step, metrics in alone["logged"].items():
            found = together["logged"][step]
            assert found.keys() == metrics.keys(), (cell, step)
            if "16-mixed" in cell:
                continue
            assert found == pytest.approx(metrics, rel=1e-3, abs=1e-6, nan_ok=True), (cell, step)
            for key in [key for key in metrics if key.startswith("grad_norm/") or key == "param_norm/total"]:
                assert found[key] == pytest.approx(metrics[key], rel=1e-5, nan_ok=True), (cell, step, key)
    if strategy.startswith("zero"):
        weights = first[str(GRID[int(numbers[0])])]["weights"]
        assert {name: first["consolidated"][name] for name in weights} == pytest.approx(weights, rel=1e-12)
        assert first["states"] == len(weights)
    if one_file:
        alone, mean = single.clipped(), {}
        for step, loss in first["adaptively_clipped"]["losses"].items():
            mean[int(step)] = (loss + second["adaptively_clipped"]["losses"][step]) / 2
        assert mean == pytest.approx(alone["losses"], rel=1e-5)
        for part in ("logged", "weights"):
            assert first["adaptively_clipped"][part] == pytest.approx(alone[part], rel=2e-5), part
        coefficients = [value for key, value in alone["logged"].items() if "clip_coefficient" in key]
        assert min(coefficients) < 0.9
        whole, started = torch.load(one_file, weights_only=True)["state_dict"], first["started_from"]
        assert started == pytest.approx({name: whole[name].double().abs().sum().item() for name in started}, rel=1e-6)
    return first, second


PLAIN = GRID.index(Cell("32-true", 2, 0.5))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "tensor_parallel", "fsdp", "zero2"])
def test_two_ranks_do_what_one_process_does(strategy, single, text, tmp_path):
    alone, saved = single(PLAIN), GRID[PLAIN].folder(single.folder) / "step=20.ckpt"
    first, second = compare(strategy, [PLAIN], single, text, tmp_path, str(saved))
    if strategy in ("fsdp2", "tensor_parallel"):
        assert first["from_one_file"] == pytest.approx(resumed_part(first[str(GRID[PLAIN])]), rel=1e-5, nan_ok=True)
        parts, one = consolidated(GRID[PLAIN].folder(tmp_path) / "step=20.ckpt"), torch.load(saved, weights_only=True)
        assert parts["state_dict"].keys() == one["state_dict"].keys()
        for name, weight in one["state_dict"].items():
            torch.testing.assert_close(parts["state_dict"][name], weight, rtol=1e-4, atol=1e-6)
        for theirs, ours in zip(parts["optimizer_states"], one["optimizer_states"], strict=True):
            for number, state in ours["state"].items():
                for key, value in state.items():
                    torch.testing.assert_close(theirs["state"][number][key], value, rtol=1e-3, atol=1e-6)
    if strategy == "tensor_parallel":  # what all devices compute, they drop alike
        assert first["dropout"] == second["dropout"]
    if strategy in ("fsdp2", "tensor_parallel", "fsdp"):
        refused = first["refused"]
        assert "NonFiniteAutopsy serves a single device and DDP, but not yet " in refused["autopsy"]
        assert "histograms=True) needs whole parameters" in refused["histograms"]
        assert refused.keys() - {"autopsy", "histograms"} == {
            "fsdp2": set(), "tensor_parallel": {"early_stopping", "schedule_free"},
            "fsdp": {"unfreezing", "early_stopping", "schedule_free", "second"},
        }[strategy]  # fmt: skip
        assert strategy != "fsdp" or "CPUFSDP has cut this model into pieces for an earlier" in refused["second"]
    sides = {"one device": alone, strategy: first[str(GRID[PLAIN])]} if strategy in ("ddp", "fsdp2") else {}
    for name, side in sides.items():
        held = side["bytes"]
        counted = next(use for use in uses(load(), devices=2) if use.strategy == name)
        assert (counted.parameters, counted.gradients, counted.states) == tuple(
            held[what] for what in ("parameters", "gradients", "states")
        )
        assert {counted.snapshots} == set(held["snapshots"]), name
    if strategy == "zero2":
        assert max(first["whole_gradients"]) < 1e-6
        refused = first["refused"]
        assert "NonFiniteAutopsy serves a single device and DDP, but not yet CPUDeepSpeed" in refused["autopsy"]
        assert "histograms=True) needs whole parameters" in refused["histograms"]
        assert "keeps two sets of weights, which CPUDeepSpeed does not save as it is set" in refused["schedule_free"]
        assert "an epoch has 3 batches and an optimizer step takes 2" in refused["window"]


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "zero2_offload"])
def test_so_do_the_other_stages_of_zero(strategy, single, text, tmp_path):
    compare(strategy, [PLAIN], single, text, tmp_path)


def test_without_deepspeed_a_run_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("lightning.pytorch.strategies.deepspeed._DEEPSPEED_AVAILABLE", False)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "default", "--config", "strategy/deepspeed_stage_2"])
    assert stop.value.code == 2
    assert "you must have DeepSpeed installed" in capsys.readouterr().err


# Any two of strategy, precision, accumulation and clipping meet in some cell.
PAIRS = {
    strategy: [Cell("32-true", 1, clips[0]), Cell("bf16-mixed", 2, clips[1]), Cell("bf16-mixed", 1, clips[0])]
    for strategy, clips in {"fsdp": (None, 0.5), "zero2": (0.5, None)}.items()
} | {
    "ddp": [Cell("32-true", 1, None), Cell("bf16-mixed", 2, 0.5), Cell("16-mixed", 1, 0.5), Cell("16-mixed", 2, None)],
    "fsdp2": [Cell("32-true", 1, 0.5), Cell("bf16-mixed", 2, None), Cell("16-mixed", 2, 0.5)],
    "tensor_parallel": [Cell("32-true", 1, None), Cell("bf16-mixed", 2, 0.5), Cell("bf16-mixed", 1, None)],
    "tensor_parallel_and_fsdp2": [GRID[PLAIN], Cell("bf16-mixed", 1, None)],
    "zero1": [GRID[PLAIN], Cell("bf16-mixed", 1, None)],
    "zero3": [GRID[PLAIN], Cell("32-true", 1, None), Cell("bf16-mixed", 2, None)],
    "zero2_offload": [GRID[PLAIN], Cell("bf16-mixed", 2, None)],
    "zero3_offload": [GRID[PLAIN], Cell("32-true", 1, None), Cell("bf16-mixed", 1, 0.5)],
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", PAIRS)
def test_the_grid_pair_by_pair(strategy, single, text, tmp_path):
    one_file = ""
    if strategy == "zero3":
        single(PLAIN)
        one_file = str(GRID[PLAIN].folder(single.folder) / "step=20.ckpt")
    compare(strategy, map(GRID.index, PAIRS[strategy]), single, text, tmp_path, one_file)


CPU_ZERO_3 = [
    "--trainer.strategy.class_path=cpu_deepspeed.CPUDeepSpeed", "--trainer.strategy.init_args.stage=3"
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        ["strategy/fsdp2"],
        ["strategy/tensor_parallel"],
        ["strategy/fsdp", "--trainer.strategy.class_path=strategy_worker.CPUFSDP"],
        ["strategy/deepspeed_stage_3", *CPU_ZERO_3],
    ],
    ids=lambda words: words[0],
)
def test_sharded_on_the_command_line(strategy, tmp_path):
    """Fit, go on, make one file of the parts, and go on from that on one device."""
    if "deepspeed" in strategy[0]:
        pytest.importorskip("deepspeed")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"checkpoint_every_n_steps": 10}))
    (tmp_path / "text.txt").write_text("".join(f"{i * i % 97:03d}, {i:04d}; " for i in range(4000)))
    sharded = ["--config", "tiny.yaml", "--config", *strategy, "--trainer.devices", "2"]

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
    if "deepspeed" in strategy[0]:
        assert "evaluate that on one device" in run("validate", *sharded, "--ckpt_path", str(last))
        assert "goes on from a folder" in run("fit", *sharded, "--ckpt_path", "whole.ckpt")
        run("consolidate", "--ckpt_path", str(last.with_name("best-step=20.ckpt")), "--to", "best.ckpt")
        found = run("validate", "--config", "tiny.yaml", "--ckpt_path", "best.ckpt", "--trainer.limit_val_batches=4")
        lines = (tmp_path / "runs" / "a" / "metrics.csv").read_text().splitlines()
        in_parts = [float(line.split(",")[2]) for line in lines if line.startswith("19,val/loss,")]
        assert [float(re.search(r"val/loss +([0-9.]+)", found)[1])] == pytest.approx(in_parts, abs=1e-4)
    else:
        sides = {}
        for name, words in (("parts", [*sharded, "--ckpt_path", str(last)]), ("whole", ["--config", "tiny.yaml"])):
            words = words if name == "parts" else [*words, "--ckpt_path", "whole.ckpt"]
            found = run("validate", *words, "--trainer.limit_val_batches=1.0")
            sides[name] = float(re.search(r"val/loss +([0-9.]+)", found)[1])
        assert sides["whole"] == pytest.approx(sides["parts"], abs=1e-4)
    assert "Trained to step 30" in run(
        "fit", "--config", "tiny.yaml", "--run", "b", "--ckpt_path", "whole.ckpt", "--trainer.max_steps=30"
    )
    if strategy[0] in ("strategy/fsdp2", "strategy/tensor_parallel"):
        assert "Trained to step 30" in run(
            "fit", *sharded, "--run", "c", "--ckpt_path", "whole.ckpt", "--trainer.max_steps=30"
        )


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_when_a_rank_dies_the_others_end_and_the_run_goes_on(dies, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"checkpoint_every_n_steps": 10}))
    (tmp_path / "text.txt").write_text("".join(f"{i * i % 97:03d}, {i:04d}; " for i in range(4000)))
    words = [sys.executable, "-W", "ignore", Path(__file__).parents[1] / "cli.py", "fit", "--config", "tiny.yaml"]
    words += ["--config", "strategy/ddp", "--trainer.devices", "2", "--run", "a"]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    beats = [tmp_path / "runs" / "a" / name for name in ("heartbeat.json", "heartbeat-rank1.json")]
    with subprocess.Popen(
        [*words, "--trainer.max_steps", "100000"], cwd=tmp_path, env={**os.environ, **paths},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as run:  # fmt: skip
        pids = [_after_step(beat, 20)["pid"] for beat in beats]
        os.kill(pids[dies], signal.SIGKILL)
        said = run.communicate(timeout=60)[0]
    assert run.returncode != 0, said
    _gone(pids[1 - dies])
    done = subprocess.run(
        [*words, "--ckpt_path", "last", "--trainer.max_steps", "150"], cwd=tmp_path, env={**os.environ, **paths},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert "Going on from step" in done.stdout + done.stderr


def _after_step(beat, step):
    for _ in range(600):
        if beat.exists() and (found := json.loads(beat.read_text()))["step"] >= step:
            return found
        time.sleep(0.2)
    raise AssertionError(f"{beat} never came to step {step}")


def _gone(pid):
    for _ in range(300):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    raise AssertionError(f"process {pid} is still there after a minute")
