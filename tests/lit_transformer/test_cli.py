"""The command line as a person uses it: what it does, what it prints, what it leaves in the run folder."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import wandb
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_callbacks.checkpointing import committed
from lit_callbacks.checkpointing.manifest import manifest_path
from lit_transformer.run.metrics_file import read_metrics
from lit_transformer.run.report import FitReport
from tiny_config import CONFIG
from wandb_file import WandbFile, finished

REPOSITORY = Path(__file__).parents[2]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_overview_names_every_command(cli):
    out = cli("--help").out
    for command in ("fit", "validate", "test", "predict", "generate"):
        assert f"  {command} " in out
    assert cli().out == out


def test_a_run_leaves_everything_in_its_folder_and_says_where(cli):
    outcome = cli("fit", "--config", "config.yaml", "--run", "a")
    assert outcome.code == 0
    run = Path("runs/a")
    for name in ("config.yaml", "metrics.csv", "checkpoints/last.ckpt", "figures/loss_curve.png"):
        assert (run / name).is_file(), name
    for name in ("metrics.csv", "checkpoints/last.ckpt", "checkpoints/best-", "figures/loss_curve.png"):
        assert name in outcome.out, name
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"last.ckpt", "step=16.ckpt", "step=20.ckpt"}
    assert not any(Path().glob("lightning_logs"))

    metrics = read_metrics(run / "metrics.csv")
    assert [step for step, _ in metrics["train/loss"]] == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    assert [step for step, _ in metrics["val/loss"]] == [9, 19]
    assert {"val/perplexity", "val/accuracy", "val/bits_per_byte", "lr/decay", "lr/no_decay"} <= set(metrics)
    assert metrics["train/loss"][-1][1] < metrics["train/loss"][0][1]
    assert "Model: LitCausalLM, " in outcome.out
    assert re.search(
        r"^step 20/20  loss .*  lr .*  grad norm .*  skipped 0  rolled back 0  tokens/s", outcome.out, re.M
    )
    unlearned = "Not learning: the model is no better than what looks at no input: loss "
    assert f"verdict   {unlearned}" in outcome.out
    assert re.search(r"^steps     20, 0 skipped, 0 rolled back, 0 lost by that$", outcome.out, re.M)
    assert re.search(r"^next      .* report --run a$", outcome.out, re.M)
    assert unlearned in cli("report", "--run", "a").out, "the report says the same"
    assert "Precision: 32-true (as configured)" in outcome.out
    assert "and how the model goes on:" in outcome.out
    assert "step 20/20  loss" in outcome.out
    assert "tokens/s" in outcome.out


def test_a_run_that_has_learned_is_healthy(cli):
    outcome = cli("fit", "--config", "config.yaml", "--run", "a", "--trainer.max_steps", "150")
    assert "verdict   Healthy: train/loss went from " in outcome.out
    assert re.search(r"^next      .* test --run a --ckpt_path best$", outcome.out, re.M)


def test_the_saved_configuration_starts_the_same_run_again(cli):
    cli("fit", "--config", "config.yaml", "--run", "a")
    cli("fit", "--config", "runs/a/config.yaml", "--run", "b")
    assert Path("runs/a/config.yaml").read_text() == Path("runs/b/config.yaml").read_text()
    tested = cli("test", "--config", "runs/a/config.yaml", "--run", "a", "--ckpt_path", "last")
    assert tested.code == 0, tested.error
    first, second = weights("runs/a/checkpoints/last.ckpt"), weights("runs/b/checkpoints/last.ckpt")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_curve_from_python_and_from_the_command_line(cli):
    from functools import partial

    from lightning.pytorch import Trainer, seed_everything

    from lit_transformer import LanguageModelingData, LitCausalLM, TransformerConfig
    from lit_transformer.run.metrics_file import MetricsFile

    cli("fit", "--config", "config.yaml", "--run", "a")
    seed_everything(3, verbose=False, workers=True)
    data = LanguageModelingData(files="text.txt", block_size=32, batch_size=4, cache_dir="cache")
    module = LitCausalLM(
        TransformerConfig(vocab_size=data.vocab_size, d_model=16, n_layers=1, n_heads=2, max_length=32),
        partial(torch.optim.AdamW, lr=0.01),
    )
    settings = CONFIG["trainer"] | {"enable_progress_bar": False, "enable_checkpointing": False}
    Trainer(**settings, logger=MetricsFile(Path("python.csv"))).fit(module, data)
    from_python, from_cli = read_metrics(Path("python.csv")), read_metrics(Path("runs/a/metrics.csv"))
    assert from_python["train/loss"] == from_cli["train/loss"]
    assert from_python["val/loss"] == from_cli["val/loss"]


def test_without_config_fit_is_the_default_configuration(cli, capsys):
    default = REPOSITORY / "configs" / "default.yaml"
    assert cli("fit", "--print_config").out == cli("fit", "--config", default, "--print_config").out
    assert cli("fit", "--config", "default", "--print_config").out == cli("fit", "--print_config").out


def test_resuming_goes_on_in_place_and_equals_the_undisturbed_run(cli):
    no_dropout = ["--model.init_args.config.attention_dropout=0", "--model.init_args.config.ffn_dropout=0"]
    no_dropout += ["--model.init_args.config.residual_dropout=0", "--model.init_args.config.embedding_dropout=0"]
    cli("fit", "--config", "config.yaml", *no_dropout, "--run", "a")
    cli("fit", "--config", "config.yaml", *no_dropout, "--run", "b")
    # As after a crash at step 19: the newest checkpoint is that of step 16, metrics.csv knows more.
    for path, manifest in committed(Path("runs/b/checkpoints")):
        if manifest.step > 16:
            path.unlink()
            manifest_path(path).unlink()
    outcome = cli("fit", "--run", "b", "--ckpt_path", "last")
    assert outcome.code == 0
    assert "Going on from step 16, runs/b/checkpoints/step=16.ckpt." in outcome.out
    expected, resumed = weights("runs/a/checkpoints/last.ckpt"), weights("runs/b/checkpoints/last.ckpt")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    metrics = [read_metrics(Path(f"runs/{run}/metrics.csv")) for run in "ab"]
    assert metrics[0].keys() == metrics[1].keys()
    assert {"train/loss", "grad_norm/total", "attention_entropy/min"} < metrics[0].keys()
    timeless = [{k: v for k, v in m.items() if not k.startswith("throughput/")} for m in metrics]
    assert timeless[0] == timeless[1]
    assert [path.name for path in Path("runs").iterdir() if path.name not in "ab"] == []


def test_a_finished_run_says_so_and_a_longer_one_goes_on(cli):
    cli("fit", "--config", "config.yaml", "--run", "a")
    assert (
        "The run is at step 20 already; to go on, raise --trainer.max_steps."
        in cli("fit", "--run", "a", "--ckpt_path", "last").out
    )
    outcome = cli("fit", "--run", "a", "--ckpt_path", "last", "--trainer.max_steps", 30)
    assert "Trained to step 30" in outcome.out
    assert [step for step, _ in read_metrics(Path("runs/a/metrics.csv"))["train/loss"]] == list(range(1, 31, 2))
    assert not list(Path("runs/a/checkpoints").glob("last-*"))  # Lightning would go on in last-v1.ckpt
    assert yaml.safe_load(Path("runs/a/config.yaml").read_text())["trainer"]["max_steps"] == 30
    assert yaml.safe_load(Path("runs/a/config-until-step-20.yaml").read_text())["trainer"]["max_steps"] == 20


def test_a_finished_run_that_is_resumed_loses_no_row(cli):
    # The newest checkpoint is saved by its last step, before the row of that step is logged.
    saved_last = ["--checkpoint_every_n_steps", "10", "--trainer.limit_val_batches", "0"]
    cli("fit", "--config", "config.yaml", *saved_last, "--run", "a")
    whole = Path("runs/a/metrics.csv").read_text()
    assert "\n19,train/loss," in whole
    assert cli("fit", "--run", "a", "--ckpt_path", "last").code == 0
    assert Path("runs/a/metrics.csv").read_text() == whole
    cli("fit", "--run", "a", "--ckpt_path", "last", "--trainer.max_steps", 30)
    assert [step for step, _ in read_metrics(Path("runs/a/metrics.csv"))["train/loss"]] == list(range(1, 31, 2))


def test_another_configuration_than_the_checkpoints_needs_a_word(cli):
    cli("fit", "--config", "config.yaml", "--run", "a")
    change = ["--model.init_args.optimizer.init_args.lr", "0.005", "--trainer.max_steps", "25"]
    refused = cli("fit", "--run", "a", "--ckpt_path", "last", *change)
    assert refused.code == 2
    assert "model.optimizer.init_args.lr was 0.01 and is 0.005" in refused.error
    assert "--allow_config_change true" in refused.error
    assert cli("fit", "--run", "a", "--ckpt_path", "last", *change, "--allow_config_change", "true").code == 0
    refused = cli("fit", "--run", "a", "--ckpt_path", "last", "--data.init_args.batch_size", 8)
    assert "data.batch_size was 4 and is 8" in refused.error
    step, lr = read_metrics(Path("runs/a/metrics.csv"))["lr/decay"][-1]
    assert (step, lr < 0.005) == (23, True)


def test_evaluation_takes_the_checkpoints_configuration_and_flags_win(cli):
    cli("fit", "--config", "config.yaml", "--run", "a")
    by_run = cli("validate", "--run", "a", "--ckpt_path", "best", "--trainer.limit_val_batches", 2)
    assert by_run.code == 0
    best = min(value for _, value in read_metrics(Path("runs/a/metrics.csv"))["val/loss"])
    assert f"{best:.5f}" in by_run.out
    checkpoint = next(Path("runs/a/checkpoints").glob("best*.ckpt"))
    moved = checkpoint.rename("somewhere.ckpt")
    tested = cli("test", "--ckpt_path", moved, "--data.init_args.batch_size", 2).out
    assert re.search(r"^test/loss +\d\.\d{5}$", tested, re.MULTILINE)
    for key in ("attention_entropy/model_blocks_0_attention_sublayer", "residual/rms_model_blocks_0"):
        assert re.search(rf"^{key} +\d", tested, re.MULTILINE), key
    assert (
        "attention_entropy"
        not in cli("test", "--ckpt_path", "somewhere.ckpt", "--attention_entropy_monitor", "null").out
    )


def test_predict_writes_a_score_per_block(cli):
    cli("fit", "--config", "config.yaml", "--run", "a")
    outcome = cli("predict", "--run", "a", "--ckpt_path", "last")
    assert "Predictions: runs/a/predictions.csv" in outcome.out
    lines = Path("runs/a/predictions.csv").read_text().splitlines()
    assert lines[0] == "sample_ids,loss"
    assert len(lines) > 5
    assert all(0 < float(line.split(",")[1]) < 10 for line in lines[1:])


def test_predict_of_a_checkpoint_from_elsewhere_writes_where_runs_are(cli):
    cli("fit", "--config", "config.yaml", "--run", "a")
    shutil.copy("runs/a/checkpoints/last.ckpt", "moved.ckpt")
    outcome = cli("predict", "--ckpt_path", "moved.ckpt", "--trainer.default_root_dir", "elsewhere")
    assert "Predictions: elsewhere/predictions.csv" in outcome.out
    assert Path("elsewhere/predictions.csv").exists()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_generate_streams_text_that_the_cache_does_not_change(cli, tokenizer):
    bpe = ["--data.init_args.tokenizer", tokenizer, "--data.init_args.bpe_vocab_size", "300"]
    assert cli("fit", "--config", "config.yaml", "--run", "a", *bpe).code == 0
    words = ["generate", "--run", "a", "--prompt", "the 1", "--max_new_tokens", 60]
    cached = cli(*words)
    assert cached.code == 0
    assert cached.out.startswith("the 1")
    assert len(cached.out) > 30
    assert cli(*words, "--use_cache", "false").out == cached.out
    assert cli(*words, "--seed", "1").out != cached.out
    last = Path("runs/a/checkpoints/last.ckpt")
    assert cli("generate", "--ckpt_path", last, "--temperature", 0, "--top_k", 5, "--top_p", 0.9).code == 0


def test_default_callbacks_are_top_level_keys(cli):
    cli("fit", "--config", "config.yaml", "--run", "a", "--gradient_norm_logger.every_n_steps", 5)
    assert [step for step, _ in read_metrics(Path("runs/a/metrics.csv"))["grad_norm/total"]] == [0, 5, 10, 15]
    cli(
        "fit",
        "--config",
        "config.yaml",
        "--run",
        "b",
        "--gradient_norm_logger",
        "null",
        "--loss_curve",
        "null",
        "--dashboard",
        "null",
    )
    assert "grad_norm/total" not in read_metrics(Path("runs/b/metrics.csv"))
    assert not Path("runs/b/figures").exists()


def test_wandb_and_tensorboard_are_one_word_each(cli, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    often = [f"--{name}.every_n_steps=5" for name in ("gradient_norm_logger", "attention_entropy_monitor")]
    dead = ["--dead_neuron_detector.every_n_steps=2", "--dead_neuron_detector.window_tokens=64"]
    fit = ["fit", "--config", "config.yaml", "--run", "a", "--wandb", "true", "--tensorboard", "true", *often, *dead]
    outcome = cli(*fit)
    assert outcome.code == 0
    assert "W&B: this run is kept offline, as there is no API key" in outcome.out
    assert "send it with wandb sync" in outcome.out
    wandb.finish()
    run = WandbFile("runs/a")  # offline, as there is no key
    pictures = {"heat_maps/attention_entropy", "heat_maps/grad_norm", "heat_maps/dead_neurons"}
    assert pictures <= run.keys
    assert run.twice() == set()
    assert all("trainer/global_step" in row for row in run.rows)
    numbers = read_metrics(Path("runs/a/metrics.csv"))
    assert set(numbers) == run.keys - pictures - {"trainer/global_step", "epoch", "events/table"}
    assert run.config["trainer"]["gradient_clip_val"] == 1.0
    assert run.config["model"]["init_args"]["config"]["d_model"] == 16
    assert run.config["data"]["init_args"]["batch_size"] == 4
    assert run.config["gradient_norm_logger"]["init_args"]["every_n_steps"] == 5
    assert run.tags == ["single_device", "32-true"]
    hidden = {key for key, metric in run.metrics.items() if metric.options.hidden}
    assert hidden <= run.keys
    assert {key.partition("/")[0] for key in hidden} >= {"grad_norm", "attention_entropy", "dead_neurons"}
    assert run.summary["val/loss"] == {"min": pytest.approx(min(value for _, value in numbers["val/loss"]))}
    assert run.summary["health/verdict"] == "not learning"
    assert "verdict   Not learning: " in outcome.out, "the terminal says the same"
    events = EventAccumulator("runs/a/tensorboard")
    events.Reload()
    assert set(events.Tags()["images"]) == pictures
    assert set(numbers) <= set(events.Tags()["scalars"])
    assert {path.name for path in Path("runs/a/figures").glob("heat*")} == {
        f"{k.replace('/', '_')}.png" for k in pictures
    }

    assert cli(*fit, "--ckpt_path", "last", "--trainer.max_steps", 22, "--allow_config_change", "true").code == 0
    wandb.finish()
    files = list(Path("runs/a/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({path.name for path in files}) == 1, "the same run goes on"
    started = [next(r.run for r in finished(path) if r.WhichOneof("record_type") == "run") for path in files]
    assert all(run.resume for run in started), "wandb sync appends the second to the first"


def test_a_logger_that_is_not_installed_is_named(cli, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    outcome = cli("fit", "--config", "config.yaml", "--run", "a", "--wandb", "true")
    assert outcome.code == 2
    assert "wandb is not installed; pip install wandb, or leave --wandb out" in outcome.error
    assert not Path("runs/a").exists()


def test_a_fast_dev_run_leaves_nothing_behind(cli):
    before = set(Path().iterdir())
    assert cli("fit", "--config", "config.yaml", "--trainer.fast_dev_run", "true").code == 0
    assert set(Path().iterdir()) - before == {Path("cache")}


def test_a_run_without_a_name_gets_one(cli):
    cli("fit", "--config", "config.yaml", "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0)
    (run,) = Path("runs").iterdir()
    assert run.name[:2] == "20"
    assert (run / "config.yaml").exists()


MISTAKES = {
    "unknown config key": (
        ["--model.init_args.config.d_modle", "32"],
        "unknown key model.init_args.config.d_modle; did you mean config.d_model",
    ),
    "unknown trainer key": (
        ["--trainer.max_stepz", "3"],
        "unknown key trainer.max_stepz; did you mean trainer.max_steps",
    ),
    "unknown top-level key": (["--wandbb", "true"], "unknown key wandbb; did you mean wandb"),
    "unknown class": (
        ["--model", "lit_transformer.LitCasualLM"],
        "no class lit_transformer.LitCasualLM; did you mean lit_transformer.LitCausalLM",
    ),
    "unknown optimizer": (
        ["--model.init_args.optimizer", "torch.optim.AdamWW"],
        "no class torch.optim.AdamWW; did you mean torch.optim.AdamW",
    ),
    "callbacks folder as a package": (
        ["--trainer.callbacks+=callbacks.NonFiniteGuard"],
        "did you mean lit_callbacks.NonFiniteGuard",
    ),
    "wrong type": (["--model.init_args.config.n_layers", "two"], "n_layers must be of type int, got two"),
    "wrong choice": (
        ["--model.init_args.config.norm_placement", "pree"],
        "norm_placement must be one of pre, post, sandwich, deepnorm, rezero, got pree",
    ),
    "heads that do not divide": (
        ["--model.init_args.config.d_model", "30", "--model.init_args.config.n_heads", "4"],
        "d_model must be divisible by n_heads, got d_model=30 and n_heads=4",
    ),
    "blocks over max_length": (["--data.init_args.block_size", "64"], "blocks of 64 tokens, but the model takes 32"),
    "missing corpus": (["--data.init_args.files", "nowhere.txt"], "nowhere.txt"),
    "empty corpus": (["--data.init_args.files", "empty.txt"], "empty"),
    "undecodable corpus": (["--data.init_args.files", "latin.txt"], "latin.txt"),
    "too small corpus": (["--data.init_args.files", "small.txt"], "tokens"),
    "unknown configuration": (["--config", "defualt"], "there is no configuration file defualt"),
    "missing checkpoint": (["--ckpt_path", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
    "not a checkpoint": (["--ckpt_path", "text.txt"], "the checkpoint text.txt is torn, or is none"),
    "nothing to resume": (["--ckpt_path", "last"], "nothing to resume"),
    "no such run": (["--ckpt_path", "last", "--run", "x"], "no run in runs/x"),
    "warm-up over the run": (
        ["--model.init_args.schedule.init_args.warmup", "50"],
        "a warm-up of 50 updates is longer than the run of 20; shorten the schedule's warmup "
        "(model.init_args.schedule.init_args.warmup;",
    ),
    "no such device": (["--trainer.devices", "0"], "devices"),
    "a slip of the keyboard": (
        ["--trainer.devices", "40000"],
        "trainer.devices is 40000, on a CPU that many processes",
    ),
    "too rare validation": (
        ["--trainer.val_check_interval", "1000"],
        "val_check_interval is 1000 batches, and an epoch has only 164: set it to at most 164, or trainer.check_val_",
    ),
    "no GPU": (["--trainer.accelerator", "gpu"], "torch finds none on this machine: --trainer.accelerator cpu"),
    "no such strategy": (["--trainer.strategy", "fsdp3"], "no fsdp3, did you mean fsdp or fsdp2? There are auto, ddp"),
    "empty YAML": (["--config", "empty.txt"], "empty.txt is empty; expected are keys and values"),
    "YAML of a list": (["--config", "list.yaml"], "list.yaml holds a list; expected are keys and values"),
    "broken YAML": (["--config", "broken.yaml"], 'in "broken.yaml", line 1, column 4'),
    "a glob for no parameter": (
        ["--gradient_norm_logger.groups", '["nothing.*"]'],
        "groups must be 'layers', 'kinds', 'parameters' or globs that match parameters, got 'nothing.*'",
    ),
    "a glob for no module": (
        ["--activation_stats_monitor.modules", "x.*"],
        "modules must match modules of LitCausalLM",
    ),
    "dormancy": (["--dead_neuron_detector.tau", "2"], "tau must be between 0 and 1, got 2.0"),
    "checkpoint cadence": (["--checkpoint_every_n_steps", "0"], "checkpoint_every_n_steps must be at least 1, got 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_paragraph_and_leaves_nothing_behind(cli, mistake):
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("plain and then caf\u00e9 ".encode("latin-1") * 500)
    Path("small.txt").write_text("too small\n")
    Path("list.yaml").write_text("- 3\n")
    Path("broken.yaml").write_text("a: [b\n")
    words, expected = MISTAKES[mistake]
    outcome = cli("fit", "--config", "config.yaml", *words)
    assert outcome.code == 2
    paragraph = outcome.error.strip().split("\n\n")[-1]
    assert paragraph.startswith("error: ")
    assert expected in paragraph
    assert len(paragraph.splitlines()) == 1
    assert "Traceback" not in outcome.error
    assert not any(Path().glob("runs/*"))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "model.init_args.config.d_modle",
            3,
            "unknown key model.init_args.config.d_modle; did you mean config.d_model",
        ),
        ("trianer.max_steps", 3, "unknown key trianer.max_steps; did you mean trainer.max_steps"),
        ("trainer.max_stepz", 3, "unknown key trainer.max_stepz; did you mean trainer.max_steps"),
        ("data.init_args.blok_size", 3, "unknown key data.init_args.blok_size; did you mean block_size"),
        ("gradient_norm_logger.every_n_steps", 0, "error: every_n_steps must be at least 1, got 0"),
        ("gradient_norm_logger.evry_n_steps", 5, "evry_n_steps; did you mean every_n_steps"),
        ("model.class_path", "lit_transformer.LitCasual", "did you mean lit_transformer.LitCausalLM"),
        ("trainer.max_steps", "three", "trainer.max_steps must be of type int, got three"),
    ],
)
def test_a_mistake_in_a_file_is_explained_like_one_in_a_flag(cli, key, value, expected):
    config = copy.deepcopy(CONFIG)
    *path, last = key.split(".")
    place = config
    for part in path:
        place = place.setdefault(part, {})
    place[last] = value
    Path("config.yaml").write_text(yaml.safe_dump(config))
    outcome = cli("fit", "--config", "config.yaml")
    assert outcome.code == 2
    assert expected in outcome.error
    assert not any(Path().glob("runs/*"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate"], "generate needs a checkpoint"),
        (["generate", "--ckpt_path", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
        (["generate", "--run", "x"], "no run in runs/x"),
        (["generate", "--run", "x", "--top_k", "0"], "top_k must be at least 1, got 0"),
        (["generate", "--run", "x", "--temprature", "1"], "unknown key temprature; did you mean temperature"),
        (["validate"], "validate needs a checkpoint"),
        (["fitt"], "unknown command fitt"),
    ],
)
def test_other_commands_explain_themselves_too(cli, words, expected):
    outcome = cli(*words)
    assert outcome.code == 2
    assert expected in outcome.error


def test_a_run_that_ended_before_its_first_validation_names_its_last_checkpoint(cli):
    cli("fit", "--config", "config.yaml", "--trainer.val_check_interval", 100, "--run", "a")
    for words in (["generate"], ["test", "--ckpt_path", "best"], ["export", "--to", "out"]):
        outcome = cli(*words, "--run", "a")
        assert outcome.code == 2
        assert "no best checkpoint; it may have ended before its first validation" in outcome.error
        assert "--ckpt_path last, which is runs/a/checkpoints/step=20.ckpt" in outcome.error
    assert cli("generate", "--run", "a", "--ckpt_path", "last", "--max_new_tokens", 4).code == 0


def test_a_run_is_never_overwritten(cli):
    cli("fit", "--config", "config.yaml", "--run", "a")
    before = Path("runs/a/checkpoints/last.ckpt").read_bytes()
    outcome = cli("fit", "--config", "config.yaml", "--run", "a")
    assert outcome.code == 2
    assert "there is a run in runs/a already" in outcome.error
    assert Path("runs/a/checkpoints/last.ckpt").read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused_naming_the_difference(cli):
    cli("fit", "--config", "config.yaml", "--run", "a")
    wider = ["--model.init_args.config.d_model", "32", "--run", "b", "--ckpt_path", "runs/a/checkpoints/last.ckpt"]
    outcome = cli("fit", "--config", "config.yaml", *wider)
    assert outcome.code == 2
    assert "model.config.d_model was 16 and is 32" in outcome.error


def test_a_folder_that_cannot_be_written_is_named(cli):
    Path("runs").write_text("a file where the folder should be")
    outcome = cli("fit", "--config", "config.yaml")
    assert outcome.code == 2
    assert "cannot write the run folder runs/" in outcome.error


def start(*words):
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'callbacks'}"}
    return subprocess.Popen(
        [sys.executable, REPOSITORY / "cli.py", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def rows(out):
    """What the table at the end says, by the name of the row."""
    return dict(re.findall(r"^(verdict|loss|steps|next) +(.*)$", out, re.MULTILINE))


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_leaves_a_usable_checkpoint_and_says_how_to_go_on(cli, workers):
    words = ["fit", "--config", "config.yaml", "--run", "a", "--trainer.max_steps", 100_000]
    process = start(*words, "--data.init_args.num_workers", workers)
    metrics = Path("runs/a/metrics.csv")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and "val/loss" in metrics.read_text()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "Traceback" not in out
    stopped_at = torch.load("runs/a/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert stopped_at > 0
    table = rows(out)
    assert list(table) == ["verdict", "loss", "steps", "next"]
    assert re.fullmatch(r"[\d.]+ in training, [\d.]+ in validation", table["loss"])
    assert table["steps"].startswith(f"{stopped_at:,}, 0 skipped")
    assert table["next"] == "python cli.py fit --run a --ckpt_path last"
    goes_on = cli("fit", "--run", "a", "--ckpt_path", "last", "--trainer.max_steps", stopped_at + 3)
    assert f"Trained to step {stopped_at + 3}" in goes_on.out


@pytest.mark.slow
def test_two_processes_train_what_one_does(cli):
    no_dropout = ["attention_dropout", "ffn_dropout", "residual_dropout", "embedding_dropout"]
    words = ["fit", "--config", "config.yaml", *(f"--model.init_args.config.{name}=0" for name in no_dropout)]
    assert cli(*words, "--run", "one").code == 0
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.batch_size=2"]
    process = start(*words, "--run", "two", *two)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    one, two = (torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("one", "two"))
    assert one["LanguageModelingData"]["position"] == two["LanguageModelingData"]["position"] == 80
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, atol=2e-4, rtol=0)
    first, second = (read_metrics(Path(f"runs/{name}/metrics.csv")) for name in ("one", "two"))
    assert first["val/loss"] == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in second["val/loss"]]
    assert first["grad_norm/total"] == [(s, pytest.approx(n, rel=1e-4)) for s, n in second["grad_norm/total"]]


def test_a_run_that_recovery_stops_says_so_and_exits_with_3(cli):
    faults = json.dumps([{"kind": "nan_weight", "step": step} for step in (6, 8, 10)])
    injector = ["--trainer.callbacks+", "lit_callbacks.testing.FaultInjector", "--trainer.callbacks.faults", faults]
    budget = ["--loss_spike_recovery.max_rollbacks", 2]
    outcome = cli("fit", "--config", "config.yaml", "--run", "a", *injector, *budget)
    assert outcome.code == 3
    assert rows(outcome.out)["verdict"].startswith("Stopped at step ")
    assert re.search(r"Stopped at step \d+: not finite.*runs/a/last_good.ckpt", outcome.error)
    assert all(value.isfinite().all() for value in weights("runs/a/last_good.ckpt").values())
    events = [json.loads(line) for line in Path("runs/a/events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] in ("rollback", "stop")] == ["rollback"] * 2 + ["stop"]
    how = rows(outcome.out)["next"].split()
    assert how[-4:] == ["--run", "a", "--ckpt_path", "runs/a/last_good.ckpt"]
    resumed = cli("fit", *how[-4:], "--trainer.callbacks", "null")
    assert resumed.code == 0
    assert weights("runs/a/checkpoints/last.ckpt").keys() == weights("runs/a/last_good.ckpt").keys()


def test_a_run_that_fails_says_how_far_it_came_and_how_to_go_on(cli, capsys, monkeypatch):
    def break_down(self, trainer, *_):
        if trainer.global_step == 12 and faults:
            raise faults.pop()

    faults = [KeyError("broken")]
    monkeypatch.setattr(FitReport, "on_train_batch_start", break_down)
    with pytest.raises(KeyError, match="broken"):
        cli("fit", "--config", "config.yaml", "--run", "a", "--checkpoint_every_n_steps", 5)
    table = rows(capsys.readouterr().out)
    assert list(table) == ["verdict", "loss", "steps", "next"]
    assert table["steps"].startswith("12, 0 skipped")
    goes_on = cli(*table["next"].split()[-5:])
    assert (goes_on.code, rows(goes_on.out)["steps"].split(",")[0]) == (0, "20")


def test_ctrl_c_without_graceful_shutdown_says_the_same(cli, monkeypatch):
    def press(self, trainer, *_):
        if trainer.global_step == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(FitReport, "on_train_batch_start", press)
    handler = signal.getsignal(signal.SIGINT)
    outcome = cli("fit", "--config", "config.yaml", "--run", "a", "--graceful_shutdown", "null")
    signal.signal(signal.SIGINT, handler)  # which Lightning has switched off for the rest of the process
    assert outcome.code == 130
    assert rows(outcome.out)["steps"].startswith("12, 0 skipped")
    assert rows(outcome.out)["next"].endswith(" fit --run a --ckpt_path last"), "from the best, at step 10"


def test_of_a_run_that_never_began_there_is_nothing_to_say(cli, capsys, monkeypatch):
    def break_down(*_):
        raise KeyError("broken")

    monkeypatch.setattr(FitReport, "on_train_start", break_down)
    with pytest.raises(KeyError, match="broken"):
        cli("fit", "--config", "config.yaml", "--run", "a")
    assert not rows(capsys.readouterr().out)
