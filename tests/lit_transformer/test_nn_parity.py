"""Blocks equal torch's own, with copied weights."""

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from lit_transformer.nn import Block, TransformerConfig
from lit_transformer.nn.attention import SelfAttention
from lit_transformer.nn.positions import RotaryPositions

D_MODEL, HEADS, D_FF, LENGTH = 32, 4, 64, 12


def pair(norm_placement, activation):
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(
        D_MODEL, HEADS, D_FF, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_placement == "pre"
    )
    for parameter in theirs.parameters():  # biases and norms away from their trivial initial values
        nn.init.normal_(parameter, std=0.3)
    config = TransformerConfig(
        d_model=D_MODEL,
        n_heads=HEADS,
        d_ff=D_FF,
        norm_placement=norm_placement,
        activation=activation,
        attention_dropout=0,
        ffn_dropout=0,
        residual_dropout=0,
    )
    ours = Block(config)
    names = {
        "attention.sublayer.qkv.weight": "self_attn.in_proj_weight",
        "attention.sublayer.qkv.bias": "self_attn.in_proj_bias",
        "attention.sublayer.out.weight": "self_attn.out_proj.weight",
        "attention.sublayer.out.bias": "self_attn.out_proj.bias",
        "attention.norm.weight": "norm1.weight",
        "attention.norm.bias": "norm1.bias",
        "feed_forward.sublayer.up.weight": "linear1.weight",
        "feed_forward.sublayer.up.bias": "linear1.bias",
        "feed_forward.sublayer.down.weight": "linear2.weight",
        "feed_forward.sublayer.down.bias": "linear2.bias",
        "feed_forward.norm.weight": "norm2.weight",
        "feed_forward.norm.bias": "norm2.bias",
    }
    ours.load_state_dict({name: theirs.state_dict()[other] for name, other in names.items()})
    return ours, theirs, names


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_block_equals_torch_encoder_layer_with_causal_mask(norm_placement, activation):
    ours, theirs, names = pair(norm_placement, activation)
    x = torch.randn(3, LENGTH, D_MODEL, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    expected = theirs(x, src_mask=mask, is_causal=True)
    got = ours(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)

    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    expected_input_gradient, x.grad = x.grad, None
    (got * weight).sum().backward()
    torch.testing.assert_close(x.grad, expected_input_gradient, atol=1e-4, rtol=1e-4)
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[names[name]].grad, atol=1e-4, rtol=1e-4)


def test_qk_norm_equals_that_of_qwen3():
    torch.manual_seed(0)
    shape = {"hidden_size": D_MODEL, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": 8}
    settings = hf.Qwen3Config(**shape, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
    settings._attn_implementation = "sdpa"
    theirs = Qwen3Attention(settings, layer_idx=0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = TransformerConfig(
        d_model=D_MODEL, n_heads=HEADS, norm="rmsnorm", norm_eps=settings.rms_norm_eps, qk_norm=True, bias=False
    )
    ours = SelfAttention(config, RotaryPositions(LENGTH, 8)).eval()
    stacked = torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight])
    weights = {"qkv.weight": stacked, "out.weight": theirs.o_proj.weight}
    weights |= {"q_norm.weight": theirs.q_norm.weight, "k_norm.weight": theirs.k_norm.weight}
    ours.load_state_dict(weights)
    x = torch.randn(3, LENGTH, D_MODEL)
    turned = Qwen3RotaryEmbedding(settings)(x, torch.arange(LENGTH)[None])
    expected, _ = theirs(x, turned, attention_mask=None)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=0)


def test_pre_and_post_differ_only_in_where_the_norm_stands():
    pre, _, _ = pair("pre", "gelu")
    post, _, _ = pair("post", "gelu")
    assert pre.state_dict().keys() == post.state_dict().keys()
    x = torch.randn(1, LENGTH, D_MODEL)
    assert not torch.allclose(pre(x), post(x), atol=0.1)
