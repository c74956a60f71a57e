"""Every shipped configuration parses, builds its model, and makes two steps."""

from pathlib import Path

import pytest
import yaml

from hf_models import save_bert
from lit_transformer.cli import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


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


def test_every_configuration_explains_itself():
    for path in CONFIGS:
        assert path.read_text().startswith("# "), path
