"""An encoder-decoder with BART's weights writes what Hugging Face's generate does; a wide beam finds the best text."""

import itertools

import pytest
import torch
import transformers as hf
from torch import nn

from lit_transformer.nn import EncoderDecoder, TransformerConfig
from lit_transformer.nn.beam_search import beam_search

D, LAYERS = 16, 2
BOS, EOS = 2, 9


def bart():
    """Theirs and ours with the same weights, which end a text now and then."""
    torch.manual_seed(0)
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder")
             for name, value in (("layers", LAYERS), ("attention_heads", 4), ("ffn_dim", 24))}  # fmt: skip
    theirs = hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=20,
            d_model=D,
            max_position_embeddings=30,
            pad_token_id=0,
            bos_token_id=BOS,
            eos_token_id=EOS,
            decoder_start_token_id=BOS,
            forced_eos_token_id=None,
            **sides,
        )
    ).eval()
    for name, parameter in theirs.named_parameters():  # such that texts differ, and some end
        is_norm = "norm" in name and name.endswith("weight")
        nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.8 if parameter.ndim > 1 else 0.1)
    config = TransformerConfig(
        vocab_size=20, max_length=30, d_model=D, n_layers=LAYERS, n_heads=4, d_ff=24, norm_placement="post",
        embedding_norm=True,
    )  # fmt: skip
    ours, other, weights = EncoderDecoder(config).eval(), theirs.model.state_dict(), {}
    for side in ("encoder", "decoder"):
        weights[f"{side}.token_embedding.weight"] = other["shared.weight"]
        weights[f"{side}.positions.embedding.weight"] = other[f"{side}.embed_positions.weight"][2:]
        for kind in ("weight", "bias"):
            weights[f"{side}.embedding_norm.{kind}"] = other[f"{side}.layernorm_embedding.{kind}"]
            for i in range(LAYERS):
                here, there = f"{side}.blocks.{i}", f"{side}.layers.{i}"
                stacked = [other[f"{there}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
                weights[f"{here}.attention.sublayer.qkv.{kind}"] = torch.cat(stacked)
                weights[f"{here}.attention.sublayer.out.{kind}"] = other[f"{there}.self_attn.out_proj.{kind}"]
                weights[f"{here}.attention.norm.{kind}"] = other[f"{there}.self_attn_layer_norm.{kind}"]
                weights[f"{here}.feed_forward.sublayer.up.{kind}"] = other[f"{there}.fc1.{kind}"]
                weights[f"{here}.feed_forward.sublayer.down.{kind}"] = other[f"{there}.fc2.{kind}"]
                weights[f"{here}.feed_forward.norm.{kind}"] = other[f"{there}.final_layer_norm.{kind}"]
                if side == "decoder":
                    cross = f"{there}.encoder_attn"
                    stacked = [other[f"{cross}.{name}_proj.{kind}"] for name in "kv"]
                    weights[f"{here}.cross_attention.sublayer.kv.{kind}"] = torch.cat(stacked)
                    weights[f"{here}.cross_attention.sublayer.q.{kind}"] = other[f"{cross}.q_proj.{kind}"]
                    weights[f"{here}.cross_attention.sublayer.out.{kind}"] = other[f"{cross}.out_proj.{kind}"]
                    weights[f"{here}.cross_attention.norm.{kind}"] = other[f"{cross}_layer_norm.{kind}"]
    weights["head.weight"] = other["shared.weight"]
    ours.load_state_dict(weights)
    return theirs, ours


def sources():
    ids = torch.randint(3, 20, (6, 8), generator=torch.Generator().manual_seed(1))
    real = torch.ones(6, 8, dtype=torch.bool)
    real[1, 5:], real[4, 2:] = False, False
    return ids.where(real, 0), real


def test_logits_are_barts():
    theirs, ours = bart()
    ids, real = sources()
    target = torch.randint(3, 20, (6, 5))
    expected = theirs(input_ids=ids, attention_mask=real.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(ours(ids, target, real), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (2, 1.0), (4, 1.0), (4, 0.0), (4, 2.0), (3, -1.0)])
def test_texts_are_those_of_hugging_face(beams, penalty):
    theirs, ours = bart()
    ids, real = sources()
    expected = theirs.generate(
        input_ids=ids, attention_mask=real.long(), num_beams=beams, length_penalty=penalty, max_new_tokens=12,
        do_sample=False, early_stopping=False,
    )  # fmt: skip
    found = beam_search(ours, ids, real, bos_id=BOS, eos_id=EOS, max_new_tokens=12, beams=beams, length_penalty=penalty)
    ended = [row[: row.index(EOS) + 1] if EOS in row else row for row in expected[:, 1:].tolist()]
    assert found == ended
    assert len({len(text) for text in found}) > 1  # some end early


def test_a_beam_that_holds_every_text_finds_the_best():
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=4, max_length=8, d_model=16, n_layers=1, n_heads=2, d_ff=16)
    model = EncoderDecoder(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    source = torch.tensor([[1, 2, 3]])
    texts = [[*text, 0] for n in range(3) for text in itertools.product((1, 2, 3), repeat=n)]
    texts += [list(text) for text in itertools.product((1, 2, 3), repeat=3)]

    def score(text):
        logits = model(source, torch.tensor([[0, *text[:-1]]])).log_softmax(-1)[0]
        return float(sum(logits[i, token] for i, token in enumerate(text))) / len(text)

    with torch.no_grad():
        best = max(texts, key=score)
    found = beam_search(model, source, bos_id=0, eos_id=0, max_new_tokens=3, beams=40)
    assert found == [best]


def test_greedy_takes_the_likeliest_token():
    _, ours = bart()
    ids, real = sources()
    found = beam_search(ours, ids, real, bos_id=BOS, eos_id=EOS, max_new_tokens=10)
    for i, text in enumerate(found):
        logits = ours(ids[i : i + 1], torch.tensor([[BOS, *text[:-1]]]), real[i : i + 1])
        assert logits.argmax(-1)[0].tolist() == text
        assert EOS not in text[:-1]
    with pytest.raises(ValueError, match="beams and max_new_tokens must be at least 1, got 0 and 3"):
        beam_search(ours, ids, bos_id=BOS, eos_id=EOS, max_new_tokens=3, beams=0)


def test_no_source_no_text():
    _, ours = bart()
    assert beam_search(ours, torch.zeros(0, 3, dtype=torch.long), bos_id=BOS, eos_id=EOS, max_new_tokens=3) == []
