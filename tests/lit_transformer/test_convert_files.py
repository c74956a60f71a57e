"""Files as they are found: names of older releases, other precisions, and settings that only look convertible."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

from lit_transformer.convert import from_hugging_face, load_hugging_face, save_hugging_face, to_hugging_face
from lit_transformer.nn import Transformer, TransformerConfig

LLAMA_LIKE = TransformerConfig(
    vocab_size=50, max_length=32, d_model=32, n_layers=1, n_heads=4, norm="rmsnorm", positions="rotary", bias=False,
    activation="swiglu",
)  # fmt: skip
GPT2_LIKE = TransformerConfig(vocab_size=50, max_length=32, d_model=32, n_layers=1, n_heads=4, activation="gelu_tanh")
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
GPT2 = hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=1, n_head=4, **NO_TOKENS)
BERT = hf.BertConfig(
    vocab_size=50, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, pad_token_id=None
)


def test_gpt2_files_without_a_prefix():
    """As OpenAI's own on the hub, masks of attention included."""
    theirs = hf.GPT2LMHeadModel(GPT2).eval()
    weights = theirs.transformer.state_dict() | {"h.0.attn.bias": torch.ones(1, 1, 32, 32).tril()}
    ids = torch.randint(50, (2, 9))
    got = from_hugging_face(GPT2.to_dict(), weights).eval()(ids)
    torch.testing.assert_close(got, theirs(ids).logits, atol=1e-4, rtol=0)


def test_bert_files_whose_norms_have_gamma_and_beta():
    theirs = hf.BertForMaskedLM(BERT)
    new = theirs.state_dict()
    old = {n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): w for n, w in new.items()}
    assert old.keys() != new.keys()
    made = (from_hugging_face(BERT.to_dict(), weights).state_dict() for weights in (old, new))
    for one, other in zip(*(weights.values() for weights in made), strict=True):
        assert torch.equal(one, other)


def test_rotary_scaling_under_its_older_name_is_refused():
    settings = to_hugging_face(Transformer(LLAMA_LIKE))[0]
    del settings["rope_parameters"]
    with pytest.raises(ValueError, match="expected type=default, got linear"):
        from_hugging_face(settings | {"rope_scaling": {"type": "linear", "factor": 4.0}}, {})


def test_embeddings_that_our_model_scales_are_refused():
    with pytest.raises(ValueError, match=r"as llama: expected init=.*, got small"):
        to_hugging_face(Transformer(replace(LLAMA_LIKE, init="small")))


def test_as_many_key_heads_as_heads_are_no_grouping():
    assert to_hugging_face(Transformer(replace(GPT2_LIKE, n_kv_heads=4)))[0]["model_type"] == "gpt2"
    with pytest.raises(ValueError, match="as gpt2: expected n_kv_heads=None, got 2"):
        to_hugging_face(Transformer(replace(GPT2_LIKE, n_kv_heads=2)))


def test_the_precision_is_that_of_the_weights(tmp_path):
    model = Transformer(GPT2_LIKE).bfloat16()
    save_hugging_face(model, tmp_path)
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    for name, weight in load_hugging_face(tmp_path).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].float())
