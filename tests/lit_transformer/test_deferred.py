"""Weights that come later are the same weights."""

import pytest
import torch
from torch import nn

from lit_transformer import LitCausalLM
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


def test_a_parameter_that_nothing_fills_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

    with deferred_weights():
        model, draws = make_model(lambda config: Odd(), TINY)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) was never initialised"):
        draws.fill(model)
