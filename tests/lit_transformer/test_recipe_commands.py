"""check, plot_schedule and lr_find, and what is said when memory is not enough."""

import re
from pathlib import Path

import pytest
import torch

from hf_models import save_bert
from lit_transformer import LitCausalLM
from lit_transformer.run.config_files import shipped_configs

TASKS = [path for path in shipped_configs() if path.parent.name == "configs"]


@pytest.mark.parametrize("size", ["small", "base"])
def test_check_says_nothing_about_a_size_on_top(cli, size):
    words = ["--data.init_args.files", "text.txt", "--trainer.val_check_interval", "2"]
    code, out, _ = cli("check", "--config", "gpt", "--config", f"size/{size}", *words)
    assert (code, out) == (0, "Nothing is wrong with this recipe that the rules know of.\n")


@pytest.mark.parametrize("config", TASKS, ids=lambda path: path.stem)
def test_check_says_nothing_about_what_is_shipped(cli, config, tmp_path):
    words = []
    if config.stem == "finetune_classifier":
        folder = save_bert(tmp_path / "model")
        words = ["--model.init_args.path", folder, "--data.init_args.tokenizer", folder]
        words += ["--data.init_args.max_length", "32"]
    code, out, _ = cli("check", "--config", config, *words)
    assert (code, out) == (0, "Nothing is wrong with this recipe that the rules know of.\n")
    assert not Path("runs").exists()


def test_check_names_mistakes_and_what_to_do(cli):
    mistakes = ["--model.init_args.schedule", "null", "--model.init_args.config.norm_placement", "post"]
    code, out, _ = cli("check", "--config", "config.yaml", *mistakes, "--trainer.gradient_clip_val", "null")
    assert code == 1
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        "error post-ln-without-warmup",
        "warning no-clipping",
    ]
    code, out, _ = cli("check", "--config", "config.yaml", *mistakes, "--silence", "[post-ln-without-warmup]")
    assert (code, out) == (0, "Nothing is wrong with this recipe that the rules know of.\n")
    code, _, error = cli("check", "--config", "config.yaml", "--silence", "[warmup]")
    assert code == 2
    assert "no finding has the id warmup" in error


def test_check_can_learn_one_batch_by_heart(cli):
    wide = ["--config", "config.yaml", "--model.init_args.config.d_model", "64", "--overfit_steps", "60"]
    code, out, _ = cli("check", *wide)
    assert code == 0
    assert re.fullmatch(r"One batch, 60 steps: the loss goes from 5\.\d+ to [01]\.\d+\.", out.splitlines()[0])
    code, out, _ = cli("check", *wide, "--model.init_args.optimizer.init_args.lr", "1e-6")
    assert code == 1
    assert "error overfit-one-batch: After 60 steps on one batch the loss is 5." in out


def test_plot_schedule_draws_every_group_and_prints_where_it_turns(cli):
    schedule = ["--model.init_args.schedule", "lit_transformer.WarmupStableDecay"]
    schedule += ["--model.init_args.schedule.init_args.warmup", "4", "--model.init_args.schedule.init_args.decay", "5"]
    code, out, _ = cli("plot_schedule", "--config", "config.yaml", *schedule, "--to", "figures/curve.png")
    assert code == 0
    assert out.splitlines() == [
        "20 updates; learning rates of group decay:",
        "  first update            0   0.0025",
        "  end of warm-up          4   0.01",
        "  start of decay         15   0.01",
        "  last update            19   0.00195",
        "Picture: figures/curve.png",
    ]
    assert Path("figures/curve.png").read_bytes().startswith(b"\x89PNG")
    code, _, error = cli("plot_schedule", "--config", "config.yaml", "--model.init_args.schedule.init_args.warmup", 30)
    assert code == 2
    assert "a warm-up of 30 updates is longer than the run of 20" in error


def test_lr_find_writes_the_curve_and_suggests_what_can_be_pasted(cli):
    quick = ["--min_lr", "1e-4", "--factor", "1.5"]
    code, out, _ = cli("lr_find", "--config", "config.yaml", *quick, "--to", "out/curve.png")
    assert code == 0
    said = ("At most", "Curve", "Suggested")  # and the progress bar
    first, where, suggestion = [line for line in out.splitlines() if line.startswith(said)]
    assert first == "At most 24 steps, from a learning rate of 0.0001 to 1."
    assert where == "Curve: out/curve.png and out/curve.csv"
    assert re.fullmatch(r"Suggested: --model.init_args.optimizer.init_args.lr [\d.e-]+", suggestion)
    lines = Path("out/curve.csv").read_text().splitlines()
    assert lines[0] == "lr,loss"
    assert lines[1].startswith("0.0001,")
    assert not Path("runs").exists()
    assert cli("check", "--config", "config.yaml", *suggestion.split()[1:])[0] == 0
    code, _, error = cli("lr_find", "--config", "config.yaml", "--factor", "0.5")
    assert (code, "factor must be above 1, got 0.5" in error) == (2, True)


def test_what_the_optimizer_refuses_is_one_paragraph(cli):
    code, _, error = cli("fit", "--config", "config.yaml", "--model.init_args.optimizer.init_args.lr", "-1")
    assert code == 2
    assert error.rstrip().endswith("error: AdamW: Invalid learning rate: -1.0")


def test_out_of_memory_names_three_settings(cli, monkeypatch):
    def training_step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nDetails")

    monkeypatch.setattr(LitCausalLM, "training_step", training_step)
    code, _, error = cli("fit", "--config", "config.yaml", "--run", "a")
    assert code == 2
    assert error.rstrip().endswith(
        "error: out of memory: CUDA out of memory. Tried to allocate 20.00 GiB. Three settings make a step smaller: "
        "data.init_args.batch_size (it is 4; trainer.accumulate_grad_batches keeps the batch), "
        "data.init_args.block_size (it is 32), and trainer.precision (it is 32-true; bf16-mixed needs less)"
    )
