"""What other people's files, and what secrets, can do: nothing."""

import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
import wandb
import yaml

from helpers import TinyLM, loader, make_trainer
from lit_callbacks import CheckpointError, ExactResume, VerifiedCheckpoint
from lit_callbacks.checkpointing import load_verified
from lit_callbacks.checkpointing.manifest import Manifest, contents
from lit_transformer.cli import main
from wandb_file import WandbFile

MARKER = "executed"
TEXT = "".join(f"line {i} of a text that is long enough\n" for i in range(200))


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder}/{MARKER}",)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A checkpoint with a payload, in a folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_TRANSFORMER_RUN", raising=False)
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "global_step": 1, "payload": Payload(tmp_path)}, path)
    torch.load(path, weights_only=False)  # it would work
    (tmp_path / MARKER).unlink()
    return path


def cli(*words):
    with pytest.raises(SystemExit) as error:
        main([str(word) for word in words])
    return error.value.code


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "generate"])
def test_no_command_runs_what_is_in_a_checkpoint(evil, command, capsys):
    assert cli(command, "--ckpt_path", evil) == 2
    assert "objects that are not plain data, so it was not loaded and nothing of it was run" in capsys.readouterr().err
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("with_manifest", [False, True])
def test_no_trainer_with_a_verified_checkpoint_does(evil, tmp_path, with_manifest):
    if with_manifest:  # whoever can write a checkpoint can write its manifest
        Manifest(1, 0, 1, "run", "owner", None, None, {}, contents(evil)).write(evil)
    callbacks = [VerifiedCheckpoint(tmp_path), ExactResume()]
    for path in (str(evil), "last") if with_manifest else (str(evil),):
        trainer = make_trainer(enable_checkpointing=True, max_steps=1, callbacks=callbacks, default_root_dir=tmp_path)
        with pytest.raises(CheckpointError, match="nothing of it was run"):
            trainer.fit(TinyLM(), loader(), ckpt_path=path)
    assert not Path(MARKER).exists()


def test_nor_when_the_environment_asks_for_it(evil, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        load_verified(evil)
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("url", ["https://example.org/a.ckpt", "s3://bucket/a.ckpt"])
def test_urls_are_not_fetched(url, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("fit", "validate", "generate"):
        assert cli(command, "--ckpt_path", url) == 2
        assert "is not on a local disk: download it, compare its SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        "trainer:\n  callbacks:\n  - class_path: subprocess.Popen\n    init_args: {args: [touch, executed]}\n",
        "model:\n  class_path: os.system\n  init_args: {command: touch executed}\n",
        "seed_everything: !!python/object/apply:os.system ['touch executed']\n",
        "data:\n  class_path: builtins.exec\n  init_args: {source: \"open('executed', 'w')\"}\n",
    ],
)
def test_a_config_cannot_name_just_anything(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("evil.yaml").write_text(config)
    assert cli("fit", "--config", "evil.yaml") == 2
    assert not Path(MARKER).exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_tokenizer_is_read_as_json_and_a_folder_of_code_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    folder = Path("tokenizer")
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "evil.Evil"}}))
    (folder / "evil.py").write_text("open('executed', 'w')")
    (folder / "tokenizer.json").write_bytes(pickle.dumps(Payload(tmp_path)))
    for given in ("tokenizer", "tokenizer/tokenizer.json"):
        words = ["--data.init_args.files", "text.txt", "--data.init_args.tokenizer", given]
        assert cli("fit", *words, "--data.init_args.cache_dir", "cache") == 2
        assert "tokenizer" in capsys.readouterr().err
    assert not Path(MARKER).exists()


SECRETS = {
    "HF_TOKEN": "hf_0123456789abcdefghij",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCY",
    "DB_PASSWORD": "correct horse battery staple",
}


def test_no_secret_of_the_environment_is_in_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIT_TRANSFORMER_RUN", raising=False)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    Path("text.txt").write_text(TEXT)
    small = {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_length": 32}
    config = {
        "trainer": {"max_steps": 4, "precision": "32-true", "accelerator": "cpu", "limit_val_batches": 1},
        "model": {"class_path": "lit_transformer.LitCausalLM", "init_args": {"config": small}},
        "data": {
            "class_path": "lit_transformer.LanguageModelingData",
            "init_args": {"files": "text.txt", "block_size": 32, "batch_size": 4, "cache_dir": SECRETS["HF_TOKEN"]},
        },
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    words = [
        "fit",
        "--config",
        "config.yaml",
        "--run",
        "a",
        "--wandb",
        "true",
        "--data.init_args.cache_dir",
        SECRETS["HF_TOKEN"],
    ]
    monkeypatch.setattr(sys, "argv", ["cli.py", *words])
    main(words)
    wandb.finish()
    assert WandbFile("runs/a").config
    assert "<redacted: HF_TOKEN>" in Path("runs/a/config.yaml").read_text()
    files = [path for path in Path("runs/a").rglob("*") if path.is_file()]
    assert any("offline-run" in str(path) for path in files)
    for path in files:
        for name, value in SECRETS.items():
            assert value.encode() not in path.read_bytes(), f"{name} is in {path}"
    saved = torch.load("runs/a/checkpoints/last.ckpt", weights_only=True)
    assert saved["datamodule_hyper_parameters"]["cache_dir"] == "<redacted: HF_TOKEN>"
