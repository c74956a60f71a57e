"""Hugging Face's GPT-2, LLaMA and BERT with the same weights say the same, learn the same, and come back to the bit."""

import json
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import nn

from lit_transformer.convert import from_hugging_face, load_hugging_face, save_hugging_face, to_hugging_face
from lit_transformer.nn import EncoderDecoder, MaskedTransformer, Transformer, TransformerConfig

GPT2 = {"vocab_size": 50, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}
LLAMA = {"vocab_size": 50, "max_position_embeddings": 32, "hidden_size": 32, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
BERT = {"vocab_size": 50, "max_position_embeddings": 32, "hidden_size": 24, "num_hidden_layers": 3}
BERT |= {"num_attention_heads": 4, "intermediate_size": 48}


def theirs(kind, **changes):
    torch.manual_seed(0)
    model = {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2 | changes)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | changes)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT | changes)),
    }[kind]().eval()
    for parameter in model.parameters():  # biases and norms away from their trivial initial values
        nn.init.normal_(parameter, std=0.2)
    return model


def ours(model):
    return from_hugging_face(model.config.to_dict(), model.state_dict()).eval()


def inputs(padding):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (3, 11), generator=generator)  # their BERT keeps the gradient of id 0, padding, at 0
    real = torch.ones(3, 11, dtype=torch.bool)
    if padding:
        real[1, 7:], real[2, 3:] = False, False
    return ids, real


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"activation_function": "relu", "n_inner": 40, "layer_norm_epsilon": 1e-3}),
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("bert", {}),
    ],
)
@pytest.mark.parametrize("padding", [False, True])
def test_logits_and_gradients_are_theirs(kind, changes, padding):
    other = theirs(kind, **changes)
    model = ours(other)
    ids, real = inputs(padding)
    expected = other(input_ids=ids, attention_mask=real.long()).logits
    got = model(ids, real) if kind == "bert" else model(ids)  # padding on the right: no causal query sees it
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)

    weight = torch.randn_like(expected[real])
    (expected[real] * weight).sum().backward()
    (got[real] * weight).sum().backward()
    for parameter in [*other.parameters(), *model.parameters()]:
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    moved = {name: value for name, value in model.state_dict().items() if name != "head.weight" or kind == "llama"}
    again = ours(other).state_dict()
    for name, value in moved.items():
        if kind == "bert" and name.endswith("positions.embedding.weight"):
            continue  # the segment's vector has a gradient of its own there
        torch.testing.assert_close(value, again[name], atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_the_way_there_and_back_loses_no_bit(kind, tmp_path):
    model = ours(theirs(kind))
    save_hugging_face(model, tmp_path)
    again = load_hugging_face(tmp_path)
    assert again.config == replace(model.config, d_ff=model.config.ffn_width)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    auto = hf.AutoModelForMaskedLM if kind == "bert" else hf.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path).eval()
    ids, _ = inputs(False)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(ids), atol=1e-4, rtol=0)


def test_models_of_ours_that_are_like_theirs():
    gpt2 = Transformer(TransformerConfig(activation="gelu_tanh"))
    assert to_hugging_face(gpt2)[0]["model_type"] == "gpt2"
    llama = {"norm": "rmsnorm", "positions": "rotary", "bias": False, "activation": "swiglu", "n_kv_heads": 2}
    assert to_hugging_face(Transformer(TransformerConfig(**llama)))[0]["model_type"] == "llama"
    bert = {"norm_placement": "post", "embedding_norm": True}
    assert to_hugging_face(MaskedTransformer(TransformerConfig(**bert)))[0]["model_type"] == "bert"


def test_what_cannot_be_converted_is_named(tmp_path):
    with pytest.raises(ValueError, match="as gpt2: expected norm_placement=pre, got post: this cannot be converted"):
        to_hugging_face(Transformer(TransformerConfig(norm_placement="post")))
    with pytest.raises(ValueError, match="EncoderDecoder is like none of their models"):
        to_hugging_face(EncoderDecoder(TransformerConfig()))
    with pytest.raises(ValueError, match="expected model_type to be one of gpt2, llama, bert, got 'mamba'"):
        from_hugging_face({"model_type": "mamba"}, {})
    with pytest.raises(ValueError, match="expected scale_attn_by_inverse_layer_idx=False, got True"):
        ours(theirs("gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ValueError, match="expected attention_bias=False, got True"):
        ours(theirs("llama", attention_bias=True))
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    with pytest.raises(ValueError, match="expected rope_type=default, got linear"):
        ours(theirs("llama", rope_parameters=scaled))
    model = theirs("gpt2")
    settings, weights = model.config.to_dict(), model.state_dict()
    with pytest.raises(ValueError, match=r"expected a weight transformer\.ln_f\.bias"):
        from_hugging_face(settings, {k: v for k, v in weights.items() if k != "transformer.ln_f.bias"})
    with pytest.raises(ValueError, match=r"there is no place for the weight adapter\.weight"):
        from_hugging_face(settings, weights | {"adapter.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"expected token_embedding\.weight of \(60, 24\), got \(50, 24\)"):
        from_hugging_face(settings | {"vocab_size": 60}, weights)
    with pytest.raises(ValueError, match=r"expected config\.json in .*, and there is none"):
        load_hugging_face(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"expected model\.safetensors in"):
        load_hugging_face(tmp_path)
