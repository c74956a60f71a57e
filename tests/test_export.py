"""Weights for others: the same model, no pickle, and damage is told."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from lit_callbacks import CheckpointError
from lit_callbacks.checkpointing import export_weights, load_exported
from lit_transformer import LitCausalLM, TransformerConfig
from lit_transformer.cli import main
from lit_transformer.commands.export import load_exported_model

CONFIG = TransformerConfig(vocab_size=64, max_length=16, d_model=16, n_layers=1, n_heads=2)


@pytest.fixture
def checkpoint(tmp_path):
    module = LitCausalLM(CONFIG, partial(torch.optim.AdamW, lr=1e-3))
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, path)
    return path, module.eval()


def test_an_exported_model_computes_the_same(checkpoint, tmp_path, capsys):
    path, module = checkpoint
    main(["export", "--ckpt_path", str(path), "--to", str(tmp_path / "out")])
    assert "Exported" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "digests.json", "model.safetensors"]
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(load_exported_model(tmp_path / "out").model(tokens), module.model(tokens))


def test_other_libraries_can_read_it(checkpoint, tmp_path):
    from safetensors.torch import load_file

    path, module = checkpoint
    export_weights(path, tmp_path / "out")
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(read[name], value) for name, value in module.state_dict().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["config"]["d_model"] == 16


def test_a_flipped_bit_is_told(checkpoint, tmp_path):
    export_weights(checkpoint[0], tmp_path / "out")
    for name in ("model.safetensors", "config.json"):
        file = tmp_path / "out" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(CheckpointError, match=f"{name} is not what was exported"):
            load_exported(tmp_path / "out")
        file.write_bytes(whole)
    (tmp_path / "out" / "digests.json").unlink()
    with pytest.raises(CheckpointError, match="is not a whole export"):
        load_exported(tmp_path / "out")


def test_mistakes_are_explained(checkpoint, tmp_path, capsys):
    path, _ = checkpoint
    export_weights(path, tmp_path / "out")
    for words, message in (
        (["--ckpt_path", str(path), "--to", str(tmp_path / "out")], "there is a model.safetensors in"),
        (["--ckpt_path", str(path)], "export needs a folder to write to: --to FOLDER"),
        (["--ckpt_path", "nowhere.ckpt", "--to", "x"], "there is no checkpoint nowhere.ckpt"),
        (["--ckpt_path", "https://example.org/a.ckpt", "--to", "x"], "is not on a local disk"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["export", *words])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    torch.save({"state_dict": {}, "hyper_parameters": {"x": torch.zeros(1)}}, path)
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        export_weights(path, tmp_path / "other")
    assert not Path("x").exists()


def test_a_checkpoint_of_no_language_model_is_refused_in_a_sentence(tmp_path, capsys):
    head = {"state_dict": {"model.head.weight": torch.zeros(2, 16)}, "hyper_parameters": {"config": vars(CONFIG)}}
    torch.save(head, tmp_path / "classifier.ckpt")
    with pytest.raises(SystemExit):
        main(
            [
                "export",
                "--ckpt_path",
                str(tmp_path / "classifier.ckpt"),
                "--hugging_face",
                "true",
                "--to",
                str(tmp_path / "o"),
            ]
        )
    expected = "language models of ours, and this checkpoint is of none: it has no token_embedding.weight. Without"
    assert expected in capsys.readouterr().err
