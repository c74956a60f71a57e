import json
from copy import copy

import numpy as np
import pytest
import tokenizers

from lit_transformer.data.tokenizer import BPETokenizer, ByteTokenizer, from_file, from_json
from lit_transformer.errors import UsageError

TEXT = "def naïve(x):\n\treturn 'Übergröße' + \"日本語 🎉\"  # <|endoftext|> is text here\n"


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else BPETokenizer.train([TEXT] * 3, vocab_size=280)


def test_text_survives(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids.tolist()) == TEXT
    assert tokenizer.encode("").size == 0


def test_text_never_contains_the_end_of_document(tokenizer):
    assert tokenizer.eos_id == 0
    assert 0 not in tokenizer.encode(TEXT)
    assert tokenizer.decode([0]) == ""


def test_token_bytes_add_up_to_the_length_of_the_text(tokenizer):
    token_bytes = tokenizer.token_bytes
    assert token_bytes.shape == (tokenizer.vocab_size,)
    assert token_bytes[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())
    assert token_bytes[tokenizer.eos_id] == 0


def test_json_round_trip(tokenizer):
    text = tokenizer.to_json()
    assert type(text) is str
    copy = from_json(text)
    assert type(copy) is type(tokenizer)
    assert copy.to_json() == text
    assert np.array_equal(copy.encode(TEXT), tokenizer.encode(TEXT))
    assert copy.pieces == tokenizer.pieces


def test_stream_never_gives_half_a_character(tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    parts = list(tokenizer.stream(iter(ids)))
    assert "".join(parts) == TEXT
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(parts)
    cut = list(tokenizer.stream(tokenizer.encode("🎉").tolist()[:-1]))
    assert set("".join(cut)) <= {"\N{REPLACEMENT CHARACTER}"}


def test_stream_gives_a_character_as_soon_as_it_is_complete():
    arriving = iter("aé!".encode())
    parts = ByteTokenizer().stream(arriving)
    assert [(next(parts), len(list(copy(arriving)))) for _ in range(3)] == [("a", 3), ("é", 1), ("!", 0)]


def test_bytes_that_are_no_text_are_replaced():
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62]) == "a\N{REPLACEMENT CHARACTER}b"


def test_bpe_learns_the_size_it_was_asked_for_and_shortens_text():
    tokenizer = BPETokenizer.train([TEXT] * 3, vocab_size=280)
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode())


def test_bpe_of_too_little_text_names_the_size_that_works():
    with pytest.raises(UsageError, match=r"got a vocabulary of 259 .* Set bpe_vocab_size=259"):
        BPETokenizer.train(["a b c"], vocab_size=300)


def test_file_of_another_library(tmp_path):
    foreign = json.loads(BPETokenizer.train([TEXT] * 3, vocab_size=280).to_json())
    foreign["added_tokens"][0]["content"] = "</s>"
    foreign["model"]["vocab"] = {
        "</s>" if token == "<|endoftext|>" else token: i for token, i in foreign["model"]["vocab"].items()
    }
    plain = dict(foreign["added_tokens"][0], id=280, content="    ", special=False)
    foreign["added_tokens"].append(plain)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(foreign))
    tokenizer = from_file(str(path))
    assert tokenizer.eos_id == 0
    assert tokenizer.vocab_size == 281
    ids = tokenizer.encode("    é")
    assert ids[0] == 280
    assert tokenizer.token_bytes[ids].sum() == 6
    assert tokenizer.decode(ids) == "    é"


def test_files_that_are_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UsageError, match=r"expected tokenizer to be 'bytes', 'bpe', or the path .*, got 'byte'"):
        from_file("byte")
    path.write_text('{"a": 1}')
    with pytest.raises(UsageError, match=r"expected the JSON of a Hugging Face tokenizer, got '\{\"a\": 1\}'"):
        from_file(str(path))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    words.save(str(path))
    with pytest.raises(UsageError, match="expected a byte-level tokenizer"):
        from_file(str(path))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    words.save(str(path))
    with pytest.raises(UsageError, match="expected a token that ends a document"):
        from_file(str(path))
