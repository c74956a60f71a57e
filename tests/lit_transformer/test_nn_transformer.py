import math
from unittest.mock import patch

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lit_transformer.nn import Transformer, TransformerConfig
from lit_transformer.nn.positions import RotaryPositions, SinusoidalPositions

SMALL = {"vocab_size": 50, "max_length": 16, "d_model": 32, "n_layers": 3, "n_heads": 4}
NO_DROPOUT = {"attention_dropout": 0, "ffn_dropout": 0, "residual_dropout": 0, "embedding_dropout": 0}


def make(**choices):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**SMALL, **choices))


@pytest.mark.parametrize("norm_placement", ["pre", "post"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_every_combination_is_causal_and_trains_every_parameter(norm_placement, norm, activation, positions):
    model = make(norm_placement=norm_placement, norm=norm, activation=activation, positions=positions, **NO_DROPOUT)
    ids = torch.randint(50, (2, 16))
    logits = model(ids)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    assert torch.equal(model(changed)[:, :9], logits[:, :9])
    assert not torch.allclose(model(changed)[:, 9:], logits[:, 9:])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert untrained == []


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_qk_norm_bounds_the_logits_and_trains(norm):
    model = make(norm=norm, qk_norm=True, positions="learned", **NO_DROPOUT)
    attention = model.blocks[0].attention.sublayer
    with torch.no_grad():
        attention.qkv.weight *= 1000
    ids = torch.randint(50, (2, 16))
    with patch("torch.nn.functional.scaled_dot_product_attention", wraps=sdpa) as attend:
        model(ids).sum().backward()
    q, k = attend.call_args_list[0].args[:2]
    assert (q @ k.mT).abs().max() <= 8.001  # unit variance over 8 features
    assert attention.q_norm.weight.grad.abs().sum() > 0
    assert attention.k_norm.weight.grad.abs().sum() > 0
    assert all("norm.bias" not in name for name, _ in attention.named_parameters())


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_swapping_two_tokens_changes_what_a_later_one_predicts(positions):
    model = make(positions=positions, **NO_DROPOUT)
    ids = torch.arange(8)[None]
    swapped = ids[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    assert not torch.allclose(model(ids)[:, -1], model(swapped)[:, -1], atol=1e-6)


def test_rotary_scores_depend_on_distance_alone():
    rotary = RotaryPositions(64, 8)
    q, k = torch.randn(8), torch.randn(8)

    def score(i, j):
        return (rotary(q.view(1, 8), i) * rotary(k.view(1, 8), j)).sum()

    torch.testing.assert_close(score(5, 2), score(45, 42), atol=1e-5, rtol=1e-5)
    assert abs(score(5, 2) - score(5, 4)) > 1e-3


def test_rotary_equals_rotation_by_complex_numbers():
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    angle = torch.arange(7)[:, None] * 10_000.0 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(RotaryPositions(7, 10)(x), expected, atol=1e-5, rtol=0)


def test_sinusoidal_positions_are_those_of_the_paper():
    positions = SinusoidalPositions(20, 6)
    got = positions(torch.zeros(1, 20, 6))[0]
    for pos in (0, 1, 7, 19):
        for i in range(3):
            assert got[pos, 2 * i] == pytest.approx(math.sin(pos / 10_000 ** (2 * i / 6)), abs=1e-5)
            assert got[pos, 2 * i + 1] == pytest.approx(math.cos(pos / 10_000 ** (2 * i / 6)), abs=1e-5)
    assert positions(torch.ones(1, 1, 6))[0, 0, 0] == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize("where", ["attention_dropout", "ffn_dropout", "residual_dropout", "embedding_dropout"])
def test_each_dropout_acts_in_training_and_not_in_evaluation(where):
    model = make(**(NO_DROPOUT | {where: 0.5}))
    ids = torch.randint(50, (2, 16))
    assert not torch.allclose(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_dropout_is_a_tenth_in_all_four_places_by_default():
    config = TransformerConfig()
    dropouts = (config.attention_dropout, config.ffn_dropout, config.residual_dropout, config.embedding_dropout)
    assert dropouts == (0.1, 0.1, 0.1, 0.1)


def test_tied_head_is_the_embedding_and_counts_once():
    tied, untied = make(), make(tie_embeddings=False)
    assert tied.head.weight is tied.token_embedding.weight
    difference = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert difference == 50 * 32


def test_without_bias_no_parameter_is_a_bias():
    assert not [name for name, _ in make(bias=False).named_parameters() if name.endswith("bias")]


def test_norm_eps_reaches_every_norm():
    model = make(norm_eps=0.01)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 3 + 1
    assert {m.eps for m in norms} == {0.01}


@pytest.mark.parametrize(
    ("init", "qkv", "out"),
    [
        ("xavier", math.sqrt(2 / (256 + 256)), math.sqrt(2 / (256 + 256))),
        ("kaiming", math.sqrt(2 / 256), math.sqrt(2 / 256)),
        ("normal", 0.02, 0.02),
        ("gpt2", 0.02, 0.02 / math.sqrt(2 * 6)),
    ],
)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_initial_standard_deviations_are_those_of_the_table(init, qkv, out, activation):
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=1000, d_model=256, n_layers=6, n_heads=4, d_ff=256, init=init, activation=activation
    )
    model = Transformer(config)
    up = "gate_up" if activation == "swiglu" else "up"
    expected = {
        "token_embedding.weight": 0.02,
        "positions.embedding.weight": 0.02,
        "blocks.2.attention.sublayer.qkv.weight": qkv,
        "blocks.2.attention.sublayer.out.weight": out,
        f"blocks.2.feed_forward.sublayer.{up}.weight": qkv,
        "blocks.2.feed_forward.sublayer.down.weight": out,
    }
    for name, std in expected.items():
        assert model.get_parameter(name).std().item() == pytest.approx(std, rel=0.03), name
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "norm" in name:
            assert parameter.min() == parameter.max() == 1, name


def test_untied_head_follows_the_table():
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=1000, d_model=256, n_heads=4, init="kaiming", tie_embeddings=False)
    model = Transformer(config)
    assert model.head.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.03)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_a_sequence_over_the_limit_is_refused():
    with pytest.raises(ValueError, match="17 tokens is longer than max_length=16"):
        make()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"d_model": 30}, "d_model=30 and n_heads=4; use n_heads=3 or d_model=32"),
        ({"n_layers": 0}, "n_layers must be at least 1, got 0"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0, got 0.0"),
        ({"attention_dropout": 1.0}, "attention_dropout must be at least 0 and below 1, got 1.0"),
        (
            {"norm_placement": "sideways"},
            "norm_placement must be one of pre, post, sandwich, deepnorm, rezero, got 'sideways'",
        ),
        ({"d_model": 36, "n_heads": 4, "positions": "rotary"}, "must be even, got 36 / 4 = 9"),
        ({"d_model": 33, "n_heads": 1, "positions": "sinusoidal"}, "even d_model, got 33"),
        ({"d_ff": 0}, "d_ff must be at least 1, got 0"),
    ],
)
def test_impossible_configurations_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(SMALL | choices))


def test_data_without_a_vocabulary_is_named():
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got None; give the data module a vocab_size"):
        TransformerConfig(vocab_size=None)


def test_feed_forward_widths():
    assert TransformerConfig(d_model=96).ffn_width == 384
    assert TransformerConfig(d_model=96, activation="swiglu").ffn_width == 256
    assert TransformerConfig(d_model=96, d_ff=100).ffn_width == 100
