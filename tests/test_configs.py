"""Every shipped configuration parses, builds its model, and makes two steps."""

from pathlib import Path

import pytest
import torch
import yaml

from hf_models import save_bert
from lit_transformer.cli import main
from lit_transformer.nn import Transformer, TransformerConfig

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SIZES = sorted((FOLDER / "size").glob("*.yaml"))
STRATEGIES = sorted((FOLDER / "strategy").glob("*.yaml"))
TASKS = ["default", "gpt", "masked_lm", "seq2seq", "classification"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_two_steps(path, tmp_path, monkeypatch):
    monkeypatch.delenv("LIT_TRANSFORMER_RUN", raising=False)
    if path.stem == "finetune_classifier":
        folder = save_bert(tmp_path / "model")
        model = [f"--model.init_args.path={folder}", f"--data.init_args.tokenizer={folder}"]
        words = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--run=a", "--data.init_args.max_length=32"]
        main(["fit", "--config", str(path), *model, *words, f"--trainer.default_root_dir={tmp_path}"])
        assert (tmp_path / "a" / "checkpoints" / "last.ckpt").exists()
        return
    words = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={tmp_path}"]
    words += ["--run=a", "--data.init_args.batch_size=2", "--data.init_args.max_length=32"]
    if path.stem in ("classification", "seq2seq"):
        warmup = "--model.init_args.schedule.init_args.warmup=1"
        main(["fit", "--config", str(path), *words, warmup, "--data.init_args.bpe_vocab_size=500"])
        assert (tmp_path / "a" / "checkpoints" / "last.ckpt").exists()
        return
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the {i}th line of a text, which is long enough\n" for i in range(2000)))
    words = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    words += [f"--data.init_args.files={text}", f"--data.init_args.cache_dir={tmp_path / 'cache'}"]
    words += [f"--trainer.default_root_dir={tmp_path}", "--run=a", "--data.init_args.batch_size=2"]
    words += ["--model.init_args.schedule.init_args.warmup=0.5"]
    main(["fit", "--config", str(path), *words])
    assert (tmp_path / "a" / "checkpoints" / "last.ckpt").exists()


def test_post_ln_is_the_default_run_but_for_what_its_name_says():
    default, post_ln = (yaml.safe_load(path.read_text()) for path in CONFIGS if path.stem in ("default", "post_ln"))
    placements = [config["model"]["init_args"]["config"].pop("norm_placement") for config in (default, post_ln)]
    assert placements == ["pre", "post"]
    assert default == post_ln


@pytest.mark.parametrize("size", SIZES, ids=lambda path: path.stem)
@pytest.mark.parametrize("task", TASKS)
def test_a_size_goes_on_top_of_any_task(task, size, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", task, "--config", f"size/{size.stem}", "--print_config"])
    assert stop.value.code == 0
    merged, wanted = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(size.read_text())
    for section, part in (("config", "config"), ("optimizer", "optimizer"), ("schedule", "schedule")):
        found = merged["model"]["init_args"][section]
        found, expected = (found if part == "config" else found["init_args"]), wanted["model"]["init_args"][part]
        expected = expected if part == "config" else expected["init_args"]
        assert {name: found[name] for name in expected} == expected
    assert merged["model"]["class_path"].startswith("lit_transformer.")
    assert merged["trainer"]["max_steps"] == wanted["trainer"]["max_steps"]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("task", TASKS)
def test_a_strategy_goes_on_top_of_any_task_and_size(task, strategy, capsys):
    fragments = ["--config", "size/large", "--config", f"strategy/{strategy.stem}"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", task, *fragments, "--print_config"])
    assert stop.value.code == 0
    merged = yaml.safe_load(capsys.readouterr().out)
    found, wanted = merged["trainer"]["strategy"], yaml.safe_load(strategy.read_text())["trainer"]["strategy"]
    if isinstance(wanted, dict):
        assert found["class_path"] == wanted["class_path"]
        assert found["init_args"].items() >= wanted["init_args"].items()
    else:
        assert found == wanted
    assert merged["model"]["init_args"]["config"]["n_layers"] == 24


def test_sizes_have_the_parameters_they_say():
    def count(name, **more):
        config = yaml.safe_load((FOLDER / "size" / f"{name}.yaml").read_text())["model"]["init_args"]["config"]
        with torch.device("meta"):
            model = Transformer(TransformerConfig(**config | more))
        return sum(p.numel() for p in model.parameters())

    assert count("gpt2_124m", vocab_size=50_257) == 124_439_808  # Hugging Face's GPT2LMHeadModel.num_parameters()
    for name, millions in (("small", 3), ("base", 85), ("large", 302)):
        embeddings = 256 * {"small": 256, "base": 768, "large": 1024}[name]
        assert round((count(name, positions="none") - embeddings) / 1e6) == millions


def test_every_configuration_explains_itself():
    for path in [*CONFIGS, *SIZES]:
        assert path.read_text().startswith("# "), path
