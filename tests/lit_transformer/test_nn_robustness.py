"""Low precision, function transforms, fake tensors, fully compiled models, and monitors that look on."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lit_callbacks.functional import attention_statistics
from lit_transformer.nn import EncoderDecoder, MaskedTransformer, Transformer, TransformerConfig, check_ids
from lit_transformer.nn.beam_search import beam_search
from lit_transformer.nn.flex import attend_blocks, window_blocks
from lit_transformer.nn.init import initialize
from lit_transformer.nn.positions import RotaryPositions, SinusoidalPositions
from lit_transformer.nn.stack import Stack

TINY = TransformerConfig(
    vocab_size=20, max_length=16, d_model=16, n_layers=2, n_heads=4,
    attention_dropout=0, ffn_dropout=0, residual_dropout=0, embedding_dropout=0,
)  # fmt: skip


@pytest.fixture
def bf16_by_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("kind", "table"), [(RotaryPositions, "cos"), (RotaryPositions, "sin")])
def test_tables_of_positions_made_in_bf16_are_off_by_a_rounding_alone(kind, table, bf16_by_default):
    made = getattr(kind(4096, 16), table)
    assert made.dtype == torch.bfloat16
    torch.set_default_dtype(torch.float32)
    assert (made.float() - getattr(kind(4096, 16), table)).abs().max() < 2**-8


def test_waves_made_in_bf16_are_off_by_a_rounding_alone(bf16_by_default):
    made = SinusoidalPositions(4096, 16).wave
    torch.set_default_dtype(torch.float32)
    assert (made.float() - SinusoidalPositions(4096, 16).wave).abs().max() < 2**-8


def test_the_gate_of_rezero_is_no_scalar_and_is_initialised():
    model = Transformer(replace(TINY, norm_placement="rezero"))
    gate = model.blocks[0].attention.gate
    assert gate.shape == (1,)
    torch.nn.init.ones_(gate)
    initialize(model, model.config, n_sublayers=4)
    assert gate.item() == 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap loops over attention
@pytest.mark.parametrize("kind", [Transformer, MaskedTransformer])
def test_gradients_of_single_samples_by_vmap(kind):
    model, ids = kind(TINY), torch.randint(20, (3, 5))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row[None],)).logsumexp(-1).mean()

    single = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
    expected = torch.func.grad(loss)(parameters, ids[1])
    for name, gradient in expected.items():
        torch.testing.assert_close(single[name][1], gradient)


def test_shapes_alone_pass_through():
    with FakeTensorMode():
        assert Transformer(TINY)(torch.zeros(2, 4, dtype=torch.long)).shape == (2, 4, 20)


@pytest.mark.parametrize(("shape", "where"), [((9,), "at position 4"), ((2, 3, 9), "at row 0, 0, position 4")])
def test_ids_of_any_shape_are_checked(shape, where):
    ids = torch.zeros(shape, dtype=torch.long)
    ids[..., 4] = 7
    with pytest.raises(IndexError, match=f"token id 7 {where} is not in the vocabulary of 5"):
        check_ids(ids, 5)
    check_ids(ids[..., :0], 5)


def test_a_masked_head_without_bias():
    assert not [name for name, _ in MaskedTransformer(replace(TINY, bias=False)).named_parameters() if "bias" in name]


def test_a_text_longer_than_the_model_is_refused_before_it_is_begun():
    with pytest.raises(ValueError, match="max_new_tokens=17 is above the model's max_length=16"):
        beam_search(EncoderDecoder(TINY), torch.ones(1, 3, dtype=torch.long), bos_id=0, eos_id=1, max_new_tokens=17)


def test_heads_that_do_not_fit_are_refused_with_what_does():
    with pytest.raises(ValueError, match="n_heads=4 and n_kv_heads=6; use n_kv_heads=2"):
        replace(TINY, n_kv_heads=6)


def test_shared_keys_are_seen_by_monitors():
    model = Transformer(replace(TINY, n_kv_heads=2))
    with patch("torch.nn.functional.scaled_dot_product_attention", wraps=sdpa) as attend:
        model(torch.randint(20, (2, 9)))
    q, k = attend.call_args_list[0].args[:2]
    shared = attention_statistics(q, k, is_causal=True)
    apart = attention_statistics(q, k.repeat_interleave(2, dim=1), is_causal=True)
    torch.testing.assert_close(shared, apart)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_inductor_compiles_the_whole_model():
    torch._dynamo.reset()
    model = Transformer(replace(TINY, qk_norm=True, n_kv_heads=2, positions="rotary", sliding_window=3))
    ids = torch.randint(20, (3, 9))
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(ids), model(ids), atol=1e-4, rtol=1e-4)


# ---- windows as blocks, for GPUs; flex attention runs forward on a CPU, too


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [9, 200])
@pytest.mark.parametrize("kind", [Transformer, MaskedTransformer, EncoderDecoder])
def test_windows_as_blocks_give_the_same_logits(kind, length):
    config = replace(TINY, max_length=200, sliding_window=5, n_kv_heads=2, positions="rotary")
    model, ids = kind(config).eval(), torch.randint(20, (2, length))
    inputs = (ids, ids) if kind is EncoderDecoder else (ids,)
    with torch.no_grad():
        expected = model(*inputs)
        with (
            patch.object(Stack, "takes_blocks", True),
            patch("lit_transformer.nn.attention.attend_blocks", wraps=attend_blocks) as used,
        ):
            got = model(*inputs)
    assert used.call_count == (4 if kind is EncoderDecoder else 2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_a_block_holds_what_the_mask_shows(causal):
    blocks = window_blocks(1000, causal, 7, torch.device("cpu"))
    distance = torch.arange(1000)[:, None] - torch.arange(1000)
    shown = create_mask(blocks.mask_mod, 1, 1, 1000, 1000, device="cpu")[0, 0]
    assert torch.equal(shown, (distance >= 0) & (distance < 7) if causal else distance.abs() < 7)
    assert blocks.sparsity() > 60


def test_blocks_are_for_gpus_and_without_dropout():
    model = Transformer(replace(TINY, d_model=64, sliding_window=3, attention_dropout=0.1))
    assert not model.takes_blocks
    model.__dict__["token_embedding"] = SimpleNamespace(weight=SimpleNamespace(is_cuda=True))
    assert not model.takes_blocks
    assert model.eval().takes_blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_windows_as_blocks_on_a_gpu():
    config = replace(TINY, d_model=64, max_length=512, sliding_window=50, n_kv_heads=2)
    model, ids = Transformer(config).cuda(), torch.randint(20, (2, 512), device="cuda")
    logits, gradients = [], []
    for blocks in (True, False):
        with patch.object(Stack, "takes_blocks", blocks):
            logits.append(model(ids))
        gradients.append(torch.autograd.grad(logits[-1].square().mean(), list(model.parameters())))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-3)
