"""Encoder, decoder and both together equal torch.nn's, with copied weights, masks and padding."""

import warnings

import pytest
import torch
from torch import nn

from lit_transformer.nn import EncoderDecoder, TransformerConfig
from lit_transformer.nn.masks import padding_mask

D, H, FF, LAYERS = 24, 4, 40, 3


def config(norm_first, **changes):
    dropout = dict.fromkeys(("attention_dropout", "ffn_dropout", "residual_dropout", "embedding_dropout"), 0.0)
    shape = {"vocab_size": 30, "d_model": D, "n_heads": H, "d_ff": FF, "n_layers": LAYERS, "max_length": 16}
    placement = "pre" if norm_first else "post"
    return TransformerConfig(**shape | dropout | {"norm_placement": placement, "activation": "relu"} | changes)


def names(block, layer, cross):
    """Ours and theirs."""
    found = [
        (f"{block}.attention.sublayer.out", f"{layer}.self_attn.out_proj"),
        (f"{block}.attention.norm", f"{layer}.norm1"),
    ]
    found += [
        (f"{block}.feed_forward.sublayer.up", f"{layer}.linear1"),
        (f"{block}.feed_forward.sublayer.down", f"{layer}.linear2"),
    ]
    found += [(f"{block}.feed_forward.norm", f"{layer}.norm{3 if cross else 2}")]
    if cross:
        found += [(f"{block}.cross_attention.sublayer.out", f"{layer}.multihead_attn.out_proj")]
        found += [(f"{block}.cross_attention.norm", f"{layer}.norm2")]
    found = [(f"{a}.{kind}", f"{b}.{kind}", None) for a, b in found for kind in ("weight", "bias")]
    for kind in ("weight", "bias"):
        found.append((f"{block}.attention.sublayer.qkv.{kind}", f"{layer}.self_attn.in_proj_{kind}", None))
        if cross:
            stacked = f"{layer}.multihead_attn.in_proj_{kind}"
            found.append((f"{block}.cross_attention.sublayer.q.{kind}", stacked, slice(0, D)))
            found.append((f"{block}.cross_attention.sublayer.kv.{kind}", stacked, slice(D, None)))
    return found


def same_as(theirs, ours, encoder, decoder):
    """Weights copied; returns what compares the gradients."""
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    pairs = []
    for i in range(LAYERS):
        pairs += names(f"encoder.blocks.{i}", f"{encoder}layers.{i}", False) if encoder is not None else []
        pairs += names(f"decoder.blocks.{i}", f"{decoder}layers.{i}", True) if decoder is not None else []
    for side, prefix in (("encoder", encoder), ("decoder", decoder)):
        if prefix is not None and isinstance(getattr(ours, side).final_norm, nn.LayerNorm):
            pairs += [(f"{side}.final_norm.{kind}", f"{prefix}norm.{kind}", None) for kind in ("weight", "bias")]
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    with torch.no_grad():
        for mine, other_name, part in pairs:
            own[mine].copy_(other[other_name] if part is None else other[other_name][part])

    def compare():
        assert {b for _, b, _ in pairs} == set(other)
        for mine, other_name, part in pairs:
            expected = other[other_name].grad if part is None else other[other_name].grad[part]
            torch.testing.assert_close(own[mine].grad, expected, atol=1e-4, rtol=1e-4)

    return compare


def make(norm_first):
    torch.manual_seed(0)
    ours = EncoderDecoder(config(norm_first))
    source, target = torch.randn(3, 9, D, requires_grad=True), torch.randn(3, 7, D, requires_grad=True)
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, 5:], real[2, 1:] = False, False
    return ours, source, target, real


def check(got, expected, inputs, compare):
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs, retain_graph=True)
    found = torch.autograd.grad((got * weight).sum(), inputs, retain_graph=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    compare()


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder(norm_first):
    ours, source, _, real = make(norm_first)
    layer = nn.TransformerEncoderLayer(D, H, FF, 0.0, batch_first=True, norm_first=norm_first)
    final = nn.LayerNorm(D) if norm_first else None
    theirs = nn.TransformerEncoder(layer, LAYERS, final, enable_nested_tensor=False)
    compare = same_as(theirs, ours, "", None)
    expected = theirs(source, src_key_padding_mask=~real)
    check(ours.encoder.run(source, padding_mask(real))[real], expected[real], [source], compare)


@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder(norm_first):
    ours, memory, target, real = make(norm_first)
    layer = nn.TransformerDecoderLayer(D, H, FF, 0.0, batch_first=True, norm_first=norm_first)
    theirs = nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(D) if norm_first else None)
    compare = same_as(theirs, ours, None, "")
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    expected = theirs(target, memory, tgt_mask=causal, memory_key_padding_mask=~real, tgt_is_causal=True)
    got = ours.decoder.run(target, "causal", memory_BSD=memory, memory_mask=padding_mask(real))
    check(got, expected, [memory, target], compare)


@pytest.mark.parametrize("norm_first", [True, False])
def test_both(norm_first):
    ours, source, target, real = make(norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about nested tensors
        theirs = nn.Transformer(D, H, LAYERS, LAYERS, FF, 0.0, batch_first=True, norm_first=norm_first)
    if not norm_first:  # it has norms at the end all the same
        theirs.encoder.norm = theirs.decoder.norm = None
    compare = same_as(theirs, ours, "encoder.", "decoder.")
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    padding = {"src_key_padding_mask": ~real, "memory_key_padding_mask": ~real}
    expected = theirs(source, target, tgt_mask=causal, tgt_is_causal=True, **padding)
    memory = ours.encoder.run(source, padding_mask(real))
    got = ours.decoder.run(target, "causal", memory_BSD=memory, memory_mask=padding_mask(real))
    check(got, expected, [source, target], compare)
