"""Counts against torch's own counter, memory against what autograd really keeps."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_transformer.nn import Decoder, Encoder, EncoderDecoder, MaskedTransformer, Transformer, TransformerConfig
from lit_transformer.nn.classifier import DecoderClassifier, EncoderClassifier
from lit_transformer.nn.summary import summarize

CONFIG = TransformerConfig(vocab_size=50, max_length=32, d_model=32, n_layers=3, n_decoder_layers=2, n_heads=4)
MODELS = {
    "decoder-only": Transformer,
    "decoder": Decoder,
    "encoder": Encoder,
    "masked": MaskedTransformer,
    "both": EncoderDecoder,
    "classifier": lambda config: EncoderClassifier(config, 7),
    "decoder classifier": lambda config: DecoderClassifier(config, 7),
}
CHOICES = [
    {},
    {"positions": "rotary", "norm": "rmsnorm", "bias": False, "activation": "swiglu", "n_kv_heads": 2, "qk_norm": True},
    {"norm_placement": "sandwich", "sliding_window": 5, "tie_embeddings": False, "stochastic_depth": 0.2},
    {"norm_placement": "rezero", "attention_dropout": 0, "ffn_dropout": 0, "residual_dropout": 0},
]
B, T, S = 4, 16, 24


def inputs(model):
    ids = torch.zeros(B, T, dtype=torch.long)
    return (torch.zeros(B, S, dtype=torch.long), ids) if isinstance(model, EncoderDecoder) else (ids,)


def kept(model):
    """Bytes of what autograd keeps of a forward pass with a cross-entropy; checkpointed blocks keep their input."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    for module in model.modules():
        if hasattr(module, "blocks"):
            for block in module.blocks:
                block.register_forward_pre_hook(lambda _, args: (keep(args[0]), None)[1])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(*inputs(model)).log_softmax(-1).sum()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("choices", CHOICES[1:3], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_operations_are_those_that_torch_counts(kind, choices):
    model = MODELS[kind](replace(CONFIG, **choices)).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no kernel of CPUs
        model(*inputs(model))
    assert summarize(model, B, T, S).flops_per_token == 3 * counter.get_total_flops() // (B * T)


def test_operations_of_a_decoder_are_the_formula():
    model = Transformer(CONFIG)
    multiplied = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "positions" not in name)
    expected = 6 * multiplied + 12 * CONFIG.n_layers * T * CONFIG.d_model
    assert summarize(model, B, T).flops_per_token == expected


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_activations_are_what_autograd_keeps(kind, choices):
    """To the percent: storages that a kernel shares differ."""
    model = MODELS[kind](replace(CONFIG, **choices))
    summary = summarize(model, B, T, S)
    assert summary.activation_bytes == pytest.approx(kept(model), rel=0.01)
    n_blocks = 5 if kind == "both" else 3
    checkpointed = kept(MODELS[kind](replace(CONFIG, activation_checkpointing=1, **choices)))
    again = (summary.activation_bytes - checkpointed) / n_blocks
    assert summary.checkpointed_bytes == pytest.approx(checkpointed + again, rel=0.01)
    assert summary.checkpointed_bytes < 0.8 * summary.activation_bytes


def test_autocast_keeps_less():
    model = Transformer(CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        low = summarize(model, B, T).activation_bytes
    assert low < summarize(model, B, T).activation_bytes


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_by_part_add_up(kind):
    model = MODELS[kind](CONFIG)
    summary = summarize(model, B, T)
    assert summary.n_parameters == sum(p.numel() for p in model.parameters())
    assert summary.parameters == summary.trainable
    assert summary.parameters["norm"] == sum(
        p.numel() for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()
    )
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    assert summary.parameters["embedding"] == sum(tables.values())


def test_what_is_frozen_costs_its_weights_alone():
    model = Transformer(CONFIG)
    model.token_embedding.requires_grad_(False)
    summary = summarize(model, B, T)
    frozen = CONFIG.vocab_size * CONFIG.d_model
    assert summary.n_parameters - sum(summary.trainable.values()) == frozen
    assert summary.weight_bytes - summary.gradient_bytes == 4 * frozen
    assert summary.optimizer_bytes == 2 * summary.gradient_bytes
    assert f"{sum(summary.trainable.values()):,} are trained" in summary.describe()


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_and_the_random_numbers_are_left_as_they_were(kind):
    model = MODELS[kind](CONFIG).eval()
    before, ids, state = dict(model.named_parameters()), [*map(id, model.parameters())], torch.get_rng_state()
    values = {name: p.detach().clone() for name, p in before.items()}
    summarize(model, B, T)
    assert [*map(id, model.parameters())] == ids
    assert all(torch.equal(p, values[name]) and type(p) is nn.Parameter for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training or module._forward_pre_hooks for module in model.modules())
    assert model.config == CONFIG
    model(*inputs(model))


def test_functional_call_leaves_a_tied_encoder_decoder_as_it_was():
    model = EncoderDecoder(CONFIG)
    own = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    torch.func.functional_call(model, zeros, inputs(model))
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == own


@pytest.mark.parametrize("sizes", [(0, 4, None), (2, 0, None), (2, 4, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        summarize(EncoderDecoder(CONFIG), *sizes)
    with pytest.raises(ValueError, match="33 tokens is longer than max_length=32"):
        summarize(Transformer(CONFIG), 1, 33)
