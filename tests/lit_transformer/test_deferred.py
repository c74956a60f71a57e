"""Weights that come later are the same weights, and no rank ever has them all."""

from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import two_ranks
from lit_transformer import LitCausalLM
from lit_transformer.errors import UsageError
from lit_transformer.nn import EncoderDecoder, MaskedTransformer, Transformer, TransformerConfig
from lit_transformer.nn.classifier import DecoderClassifier
from lit_transformer.strategies.deferred import deferred_weights, make_model
from tiny_task import TINY, Blocks, trainer

SHAPE = {"vocab_size": 11, "max_length": 8, "d_model": 16, "n_layers": 2, "n_heads": 4}
MODELS = {
    "default": (Transformer, {}),
    "llama": (Transformer, {"n_kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm", "positions": "rotary"}),
    "xavier": (Transformer, {"init": "xavier", "tie_embeddings": False}),
    "kaiming": (Transformer, {"init": "kaiming", "qk_norm": True}),
    "small": (Transformer, {"init": "small", "positions": "sinusoidal"}),
    "rezero": (Transformer, {"norm_placement": "rezero"}),
    "deepnorm": (Transformer, {"norm_placement": "deepnorm"}),
    "masked": (MaskedTransformer, {}),
    "encoder_decoder": (EncoderDecoder, {}),
    "classifier": (lambda config: DecoderClassifier(config, 3), {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_deferred_weights_are_those_of_a_model_that_was_made_whole(name):
    network, options = MODELS[name]
    config = TransformerConfig(**SHAPE | options)
    torch.manual_seed(0)
    whole = network(config)
    after = torch.rand(3)
    torch.manual_seed(0)
    with deferred_weights():
        parts, draws = make_model(network, config)
    assert all(parameter.is_meta for parameter in parts.parameters())
    torch.testing.assert_close(torch.rand(3), after, rtol=0, atol=0)  # what is drawn later is the same, too
    draws.fill(parts)
    assert [n for n, _ in parts.named_parameters()] == [n for n, _ in whole.named_parameters()]  # tied as before
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_fit_without_a_sharded_strategy_gives_all_weights(tmp_path):
    losses = []
    for context in (deferred_weights(), torch.enable_grad()):
        torch.manual_seed(0)
        with context:
            task = LitCausalLM(TINY)
        fit = trainer(tmp_path)
        fit.fit(task, Blocks())
        losses.append(fit.callback_metrics["train/loss"])
    assert losses[0] == losses[1]


def test_a_run_that_ends_before_there_are_weights_says_why_and_can_be_mended(tmp_path):
    with deferred_weights():
        task = LitCausalLM(TINY)
    data = Blocks()
    data.block_size = 9
    with pytest.raises(UsageError, match="in blocks of 9 tokens, but the model takes 8"):
        trainer(tmp_path).fit(task, data)
    assert next(task.parameters()).is_meta
    trainer(tmp_path, max_steps=1).fit(task, Blocks())
    assert next(task.parameters()).device.type == "cpu"


def test_a_parameter_that_nothing_fills_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

    with deferred_weights():
        model, draws = make_model(lambda config: Odd(), TINY)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) was never initialised"):
        draws.fill(model)


def test_another_dtype_is_that_of_the_same_numbers():
    torch.manual_seed(0)
    whole = Transformer(TINY)
    torch.manual_seed(0)
    with deferred_weights():
        parts, draws = make_model(Transformer, TINY)
    draws.fill(parts.to(torch.bfloat16))
    torch.testing.assert_close(parts.state_dict(), whole.bfloat16().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_copied_into_weights_that_come_later_comes_with_them(dtype):
    with deferred_weights():
        model, draws = make_model(lambda config: nn.Linear(2, 3), TINY)
    model.to(dtype)
    weight = torch.arange(6.0).view(3, 2)
    with draws, torch.no_grad():
        model.weight.copy_(weight)
        model.bias[:2].copy_(torch.tensor([7.0, 8.0]))
    assert model.weight.is_meta
    draws.fill(model)
    assert model.weight.dtype == dtype
    assert model.weight.tolist() == weight.tolist()
    assert model.bias[:2].tolist() == [7, 8]
    assert -1 < model.bias[2] < 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are Linux's")
@pytest.mark.parametrize(
    "strategies", [["fsdp"], pytest.param(["fsdp2", "zero3", "zero3_offload"], marks=pytest.mark.slow)]
)
def test_no_rank_ever_has_the_whole_model(strategies, tmp_path, monkeypatch):
    if "zero3" in strategies:
        pytest.importorskip("deepspeed", reason="pip install 'lit-transformer[deepspeed]'")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back
    for rank in two_ranks(Path(__file__).with_name("deferred_worker.py"), tmp_path, "deferred", *strategies):
        for strategy in strategies:
            parts, whole = rank[strategy]["large"]["parts"], rank[strategy]["large"]["whole"]
            assert parts["without"]
            assert not whole["without"]
            assert 90 < parts["whole"] < 100
            assert whole["peak"] > 0.95 * whole["whole"], strategy
            assert parts["peak"] < 0.85 * parts["whole"], strategy  # half of it, a block or two, and what FSDP copies
            assert parts["trained"] == whole["trained"]
            half = rank[strategy]["half"]
            assert half["parts"]["trained"] == half["whole"]["trained"], strategy
            assert "val/loss" in half["parts"]["trained"]
