"""Texts to ids by tokenizers that are trained on them."""

import pytest

from lit_transformer.data.encoder import Encoder
from lit_transformer.data.tokenizer import TRAINED, from_json
from lit_transformer.errors import UsageError


@pytest.mark.parametrize("name", TRAINED)
def test_a_tokenizer_is_trained_once_and_can_be_saved(name):
    encoder = Encoder(name, max_length=100, bpe_vocab_size=259)
    assert encoder.vocab_size == 259
    texts = ["the lower", "the lowest of the low", "é, 日本"]
    encoder.train(texts * 9)
    encoder.train(["other text"])
    assert encoder.vocab_size == 259
    ids, lengths = encoder(texts)
    assert [encoder.decode(row) for row in ids] == texts
    assert lengths.tolist() == [len(row) for row in ids]
    assert len(ids[1]) < len(texts[1])
    copy = from_json(encoder.state["tokenizer"])
    assert type(copy) is TRAINED[name]
    assert [copy.encode(text).tolist() for text in texts] == ids
    (other,) = set(TRAINED) - {name}
    assert Encoder(name, 100, 259, saved=encoder.state)(texts)[0] == ids
    with pytest.raises(UsageError, match=f"of 259 tokens, is not tokenizer={other}"):
        Encoder(other, 100, 259, saved=encoder.state)
