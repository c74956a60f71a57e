"""Every choice of the family: by hand, against its definition, in expectation, and under compile."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_mask

from lit_transformer.nn import Decoder, Encoder, EncoderDecoder, MaskedTransformer, Transformer, TransformerConfig
from lit_transformer.nn.masks import bidirectional_mask, causal_mask
from lit_transformer.nn.residual import RESIDUALS, StochasticDepth, deepnorm_constants

TINY = TransformerConfig(
    vocab_size=20, max_length=16, d_model=16, n_layers=2, n_heads=4,
    attention_dropout=0, ffn_dropout=0, residual_dropout=0, embedding_dropout=0,
)  # fmt: skip
MODELS = [Transformer, Decoder, Encoder, EncoderDecoder, MaskedTransformer]
CHOICES = [
    {},
    {"norm_placement": "post"},
    {"norm_placement": "sandwich"},
    {"norm_placement": "deepnorm"},
    {"norm_placement": "rezero"},
    {"activation": "silu"},
    {"activation": "geglu"},
    {"activation": "swiglu", "norm": "rmsnorm", "bias": False},
    {"positions": "none"},
    {"positions": "rotary", "n_kv_heads": 2},
    {"n_kv_heads": 1, "qk_norm": True},
    {"qk_norm": True, "n_decoder_layers": 1},
    {"sliding_window": 3},
    {"init": "small"},
    {"tie_embeddings": False, "embedding_norm": True},
    {"stochastic_depth": 0.5, "residual_dropout": 0.1},
    {"activation_checkpointing": 1, "attention_dropout": 0.1},
]


def said(model, ids, real=None):
    if isinstance(model, EncoderDecoder):
        return model(ids, ids[:, :5], real)
    return model(ids, real) if isinstance(model, Encoder | MaskedTransformer) else model(ids)


def ids(batch=3, length=9):
    return torch.randint(20, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_choice_trains_every_parameter(model, choices):
    torch.manual_seed(0)
    model = model(replace(TINY, **choices))
    if choices.get("norm_placement") == "rezero":  # at the start only the gates have gradients
        for name, parameter in model.named_parameters():
            nn.init.ones_(parameter) if name.endswith("gate") else None
    said(model, ids(64)).square().sum().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name for name in still if "k_norm" not in name} == set()


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("model", [Transformer, Decoder])
def test_no_token_sees_a_later_one(model, choices):
    model = model(replace(TINY, **choices)).eval()
    other = ids()
    other[:, 6:] = (other[:, 6:] + 1) % 20
    torch.testing.assert_close(model(ids())[:, :6], model(other)[:, :6])
    assert not torch.allclose(model(ids())[:, 6:], model(other)[:, 6:])


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("model", [Encoder, MaskedTransformer, EncoderDecoder])
def test_padding_is_not_seen(model, choices):
    model = model(replace(TINY, **choices)).eval()
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, 5:], real[2, 2:] = False, False
    other = ids()
    other[~real] = (other[~real] + 1) % 20
    expected, got = said(model, ids(), real), said(model, other, real)
    if isinstance(model, EncoderDecoder):
        other[:, :5] = ids()[:, :5]
        expected, got = model(ids(), ids()[:, :5], real), model(other, ids()[:, :5], real)
        torch.testing.assert_close(got[:2], expected[:2])
    else:
        torch.testing.assert_close(got[real], expected[real])
        short = said(model, ids()[1:2, :5])
        torch.testing.assert_close(expected[1:2, :5], short, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("model", [Encoder, MaskedTransformer, EncoderDecoder])
def test_a_row_of_nothing_but_padding_is_finite_and_moves_no_other(model, window):
    torch.manual_seed(0)
    model = model(replace(TINY, sliding_window=window))
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1] = False
    with_row = said(model, ids(), real)[[0, 2]]
    torch.testing.assert_close(with_row, said(model, ids()[[0, 2]], real[[0, 2]]))
    said(model, ids(), real).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("choices", [c for c in CHOICES if "stochastic_depth" not in c], ids=str)
def test_caches_change_nothing(choices):
    torch.manual_seed(0)
    config = replace(TINY, **choices)
    model, caches = Transformer(config).eval(), None
    caches = model.make_caches()
    pieces = [model(ids()[:, a:b], caches) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids()), atol=1e-5, rtol=1e-5)
    both = EncoderDecoder(config).eval()
    memory, caches = both.encode(ids()), both.make_caches()
    pieces = [both.decode(ids()[:, a:b], memory, None, caches) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(pieces, 1), both.decode(ids(), memory), atol=1e-5, rtol=1e-5)


# ---- where the norm stands


def test_placements_are_their_formulas():
    class Triple(nn.Module):
        def forward(self, x):
            return 3 * x

    x = torch.randn(2, 5, 16)
    norm = nn.LayerNorm(16)
    formulas = {
        "pre": x + 3 * norm(x),
        "post": norm(x + 3 * x),
        "sandwich": x + norm(3 * norm(x)),
        "deepnorm": norm(2.0 * x + 3 * x),
        "rezero": x,
    }
    for name, expected in formulas.items():
        residual = RESIDUALS[name](Triple(), TINY, 0.0, 2.0)
        torch.testing.assert_close(residual(x), expected)
    residual.gate.data.fill_(0.5)
    torch.testing.assert_close(residual(x), x + 0.5 * 3 * x)


def test_constants_of_deepnorm():
    """Table 1 of the paper, by its two examples with 6 layers, and torchscale's formulas."""
    assert deepnorm_constants(6, 0)[0] == pytest.approx((12**0.25, 48**-0.25))
    assert deepnorm_constants(0, 6)[1] == pytest.approx((12**0.25, 48**-0.25))
    encoder, decoder = deepnorm_constants(6, 6)
    assert encoder == pytest.approx((6 ** (5 / 16) * 0.81, 6 ** (-5 / 16) * 0.87))
    assert decoder == pytest.approx((18**0.25, 72**-0.25))
    model = EncoderDecoder(replace(TINY, norm_placement="deepnorm", n_layers=6))
    assert model.encoder.blocks[0].attention.alpha == pytest.approx(encoder[0])
    assert model.decoder.blocks[5].cross_attention.alpha == pytest.approx(decoder[0])


# ---- initialisation


def parts(model):
    """What the table has rows for: each parameter's matrices by role."""
    d = model.config.d_model
    keys, ff = model.config.kv_heads * model.config.head_dim, model.config.ffn_width
    for name, p in model.named_parameters():
        role = name.split(".")[-2] if "." in name else name
        if p.ndim < 2:
            yield (
                (
                    "gate0"
                    if name.endswith("gate")
                    else "norm"
                    if "norm" in role and name.endswith("weight")
                    else "bias"
                ),
                p,
            )
        elif role in ("qkv", "kv"):
            sizes = [d, keys, keys] if role == "qkv" else [keys, keys]
            for part, matrix in zip("qkv"[3 - len(sizes) :], p.split(sizes), strict=True):
                yield ("values" if part == "v" else "queries"), matrix
        elif role == "gate_up":
            yield from (("up", matrix) for matrix in p.split([ff, ff]))
        elif "embedding" in role:
            yield "embedding", p
        else:
            yield {"q": "queries", "out": "out", "down": "out", "up": "up", "head": "head"}[role], p


@pytest.mark.parametrize("init", ["xavier", "kaiming", "normal", "gpt2", "small", "deepnorm"])
@pytest.mark.parametrize("kind", [Transformer, EncoderDecoder])
def test_the_table_of_standard_deviations(kind, init):
    torch.manual_seed(0)
    d = 256
    config = TransformerConfig(
        vocab_size=400, max_length=64, d_model=d, n_layers=3, n_decoder_layers=2, n_heads=4, n_kv_heads=2,
        activation="swiglu", tie_embeddings=False, qk_norm=True,
        **({"norm_placement": "deepnorm"} if init == "deepnorm" else {"init": init}),
    )  # fmt: skip
    model = kind(config)
    for stack in [model] if kind is Transformer else [model.encoder, model.decoder]:
        decoder = kind is EncoderDecoder and stack is model.decoder
        n = 3 * 2 if decoder else 2 * 3
        if kind is Transformer:
            beta = deepnorm_constants(0, 3)[1][1]
        else:
            beta = deepnorm_constants(3, 2)[1 if decoder else 0][1]
        for role, p in parts(stack):
            if role in ("norm", "bias", "gate0"):
                assert (p == (1 if role == "norm" else 0)).all()
                continue
            xavier, small = math.sqrt(2 / sum(p.shape)), math.sqrt(2 / (5 * d))
            expected = {
                "xavier": 0.02 if role == "embedding" else xavier,
                "kaiming": 0.02 if role == "embedding" else math.sqrt(2 / p.shape[1]),
                "normal": 0.02,
                "gpt2": 0.02 / math.sqrt(n) if role == "out" else 0.02,
                "small": small / math.sqrt(n) if role == "out" else small,
                "deepnorm": 0.02 if role == "embedding" else xavier * (1 if role in ("queries", "head") else beta),
            }[init]
            assert float(p.detach().std()) == pytest.approx(expected, rel=0.03), (role, p.shape)
            assert abs(float(p.detach().mean())) < 5 * expected / math.sqrt(p.numel())


def test_small_embeddings_are_scaled_where_they_enter():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(d_model=256, init="small", positions="rotary", embedding_dropout=0))
    assert float(model.embed(ids()).detach().std()) == pytest.approx(math.sqrt(2 / 5), rel=0.05)


def test_tied_matrices_are_one():
    for model in (Transformer(TINY), EncoderDecoder(TINY), MaskedTransformer(TINY)):
        shapes = [p.shape for p in model.parameters() if p.shape[0] == TINY.vocab_size and p.ndim == 2]
        assert len(shapes) == 1
        std = float(next(p for p in model.parameters() if p.shape[0] == TINY.vocab_size).detach().std())
        assert std == pytest.approx(0.02, rel=0.15)


# ---- stochastic depth


def test_stochastic_depth_leaves_samples_out_and_keeps_the_expectation():
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.3), torch.ones(20_000, 2, 3)
    out = layer(x)
    kept = out[:, 0, 0] != 0
    assert torch.equal(out[kept], x[kept] / 0.7)
    assert not out[~kept].any()
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 20_000))
    assert torch.equal(layer.eval()(x), x)


def test_stochastic_depth_rises_linearly_over_the_blocks():
    model = Transformer(replace(TINY, n_layers=4, stochastic_depth=0.2))
    drops = [block.attention.dropout[1].p for block in model.blocks]
    assert drops == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert not any(isinstance(module, StochasticDepth) for module in Transformer(TINY).modules())


# ---- windows


def test_windows_are_those_of_flex_attention():
    def causal(b, h, q, k):
        return (q >= k) & (q - k < 4)

    def near(b, h, q, k):
        return (q - k).abs() < 4

    device = torch.device("cpu")
    expected = create_mask(causal, 1, 1, 12, 12, device="cpu")[0, 0]
    assert torch.equal(causal_mask(12, 0, 4, device), expected)
    assert torch.equal(causal_mask(3, 9, 4, device), expected[9:])
    assert torch.equal(bidirectional_mask(12, 4, None, device), create_mask(near, 1, 1, 12, 12, device="cpu")[0, 0])


def test_a_window_that_holds_everything_is_none():
    a, b = (Transformer(replace(TINY, sliding_window=w)).eval() for w in (16, None))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(ids()), b(ids()))
    assert causal_mask(9, 0, 16, torch.device("cpu")) == "causal"


def test_what_is_behind_the_window_is_not_seen():
    model = Transformer(replace(TINY, sliding_window=3, n_layers=1)).eval()
    other = ids()
    other[:, 0] = (other[:, 0] + 1) % 20
    torch.testing.assert_close(model(ids())[:, 3:], model(other)[:, 3:])
    assert not torch.allclose(model(ids())[:, 2], model(other)[:, 2])


# ---- memory, precision, compile


@pytest.mark.parametrize("every", [1, 2])
def test_activation_checkpointing_changes_no_gradient(every):
    def gradients(n):
        torch.manual_seed(0)
        model = Transformer(replace(TINY, activation_checkpointing=n, residual_dropout=0.3, stochastic_depth=0.2))
        torch.manual_seed(1)
        model(ids()).square().sum().backward()
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, gradients(every), gradients(0)))


def test_activation_checkpointing_keeps_less():
    def kept(n):
        size = 0

        def pack(x):
            nonlocal size
            size += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            Transformer(replace(TINY, activation_checkpointing=n, n_layers=4))(ids())
        return size

    assert kept(1) < 0.4 * kept(0)
    assert kept(1) < kept(2) < kept(0)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_softmax_are_as_exact_as_their_inputs(norm, dtype):
    """Against float64 on the same rounded inputs, the error is that of rounding the result."""
    torch.manual_seed(0)
    config = replace(TINY, norm=norm, d_model=512, n_heads=4, n_layers=1)
    layer = Transformer(config).blocks[0].attention.norm
    x = (100 + torch.randn(4, 6, 512)).to(dtype)
    exact = layer.double()(x.double()).detach()
    found = layer.to(dtype)(x).detach().double()
    assert float((found - exact).abs().max()) < 2 * torch.finfo(dtype).eps * float(exact.abs().max())
    q, k, v = (torch.randn(2, 4, 64, 32).to(dtype) for _ in range(3))
    weights = (q.double() @ k.double().mT / math.sqrt(32)).softmax(-1)
    found = nn.functional.scaled_dot_product_attention(q, k, v).double()
    assert float((found - weights @ v.double()).abs().max()) < 4 * torch.finfo(dtype).eps


COMPILED = [
    {},
    {"norm_placement": "deepnorm", "sliding_window": 3},
    {"qk_norm": True, "n_kv_heads": 2, "positions": "rotary", "stochastic_depth": 0.3, "residual_dropout": 0.1},
    {"activation_checkpointing": 1, "activation": "geglu", "init": "small"},
]


@pytest.mark.parametrize("choices", COMPILED, ids=str)
@pytest.mark.parametrize("model", [Transformer, MaskedTransformer, EncoderDecoder])
def test_compile_breaks_no_graph(model, choices):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = model(replace(TINY, **choices))
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, 5:] = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    said_by = compiled(ids(), ids()[:, :5], real) if isinstance(model, EncoderDecoder) else (
        compiled(ids(), real) if isinstance(model, MaskedTransformer) else compiled(ids())
    )  # fmt: skip
    said_by.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if not choices.get("stochastic_depth"):
        torch.testing.assert_close(said_by, said(model, ids(), real), atol=1e-5, rtol=1e-5)


# ---- what is refused


@pytest.mark.parametrize("model", [Transformer, Encoder, EncoderDecoder])
def test_ids_outside_the_vocabulary_are_refused_with_their_place(model):
    for wrong in (20, -1):
        bad = ids()
        bad[1, 4] = wrong
        with pytest.raises(IndexError, match=rf"token id {wrong} at row 1, position 4 is not in the vocabulary of 20"):
            said(model(TINY), bad)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"norm_placement": "deepnorm", "init": "xavier"}, "deepnorm brings its own initialisation, got init=xavier"),
        ({"n_kv_heads": 3}, "n_heads must be divisible by n_kv_heads, got n_heads=4 and n_kv_heads=3"),
        ({"n_kv_heads": 0}, "n_kv_heads must be at least 1, got 0"),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"n_decoder_layers": 0}, "n_decoder_layers must be at least 1, got 0"),
        ({"stochastic_depth": 1.0}, "stochastic_depth must be at least 0 and below 1, got 1.0"),
        ({"activation_checkpointing": -1}, "activation_checkpointing must be at least 0, got -1"),
        ({"rope_base": 0.0}, "rope_base must be above 0, got 0.0"),
        ({"init": "zeros"}, "init must be one of xavier, kaiming, normal, gpt2, small, got 'zeros'"),
    ],
)
def test_what_contradicts_itself_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **choices)
