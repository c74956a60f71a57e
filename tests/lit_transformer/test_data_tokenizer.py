import json
import re
from copy import copy

import numpy as np
import pytest
import tokenizers

from lit_transformer.data.tokenizer import TRAINED, BPETokenizer, ByteTokenizer, UnigramTokenizer, from_file, from_json
from lit_transformer.errors import UsageError

TEXT = "def naïve(x):\n\treturn 'Übergröße' + \"日本語 🎉\"  # <|endoftext|> is text here\n"


@pytest.fixture(scope="module", params=["bytes", "bpe", "unigram"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    return TRAINED[request.param].train([TEXT] * 3, vocab_size={"bpe": 280, "unigram": 259}[request.param])


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


def test_unigram_takes_the_most_probable_way_to_cut_a_word():
    tokenizer = UnigramTokenizer.train([TEXT, "low lower lowest " * 50, "new newer newest " * 30], vocab_size=266)
    assert tokenizer.vocab_size == 266
    scores = dict(json.loads(tokenizer.to_json())["model"]["vocab"])
    for word in ("lower", "newest", "slow", "owe"):

        def best(word):
            if not word:
                return 0.0
            return max(scores[word[:i]] + best(word[i:]) for i in range(1, len(word) + 1) if word[:i] in scores)

        pieces = [tokenizer.decode([i]) for i in tokenizer.encode(word)]
        assert sum(scores[piece] for piece in pieces) == pytest.approx(best(word))
    assert len(tokenizer.encode(" lower lower")) <= 6


def test_unigram_cuts_any_text_and_puts_it_together_again():
    tokenizer = UnigramTokenizer.train(["some words in plain letters, and more words"] * 5, vocab_size=258)
    text = "".join(chr(i) for i in [*range(0x250), 0x4E00, 0x1F389, 0x10FFFF]) + " <|endoftext|>\r\n\r\n  "
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert 0 not in ids


def test_unigram_learns_the_same_each_time():
    words = [f"{i * 7919 % 1013} {chr(97 + i % 26) * (i % 5)}{chr(97 + i % 7)}" for i in range(800)]
    first, *others = (UnigramTokenizer.train(words, vocab_size=320).to_json() for _ in range(3))
    assert others == [first, first]


def test_unigram_of_too_little_text_names_the_size_that_works():
    words = [TEXT, "low lower lowest " * 50]
    with pytest.raises(UsageError, match=r"got a vocabulary of \d+ .* Set bpe_vocab_size=2\d\d") as error:
        UnigramTokenizer.train(words, vocab_size=300)
    works = int(re.search(r"Set bpe_vocab_size=(\d+)", str(error.value))[1])
    assert UnigramTokenizer.train(words, vocab_size=works).vocab_size == works


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


def test_a_tokenizer_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = BPETokenizer.train([TEXT] * 3, vocab_size=280)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(ours.to_json()))
    whole.save_pretrained(tmp_path / "folder")
    found = from_file(str(tmp_path / "folder"))
    assert found.pieces == ours.pieces
    assert np.array_equal(found.encode(TEXT), ours.encode(TEXT))
    without = {"vocab": tmp_path / "gpt2" / "vocab.json", "merges": tmp_path / "gpt2" / "merges.txt"}
    without["vocab"].parent.mkdir()
    model = json.loads(ours.to_json())["model"]
    without["vocab"].write_text(json.dumps(model["vocab"]))
    without["merges"].write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    by_name = from_file(str(tmp_path / "gpt2"))
    assert by_name.decode(by_name.encode(TEXT)) == TEXT
    assert len(by_name.encode(TEXT)) == len(ours.encode(TEXT))


def test_files_that_are_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(
        UsageError, match=r"expected tokenizer to be 'bytes', 'bpe', 'unigram', a tokenizer.json, or .* got 'byte'"
    ):
        from_file("byte")
    with pytest.raises(UsageError, match=r"expected the path of a tokenizer\.json, got .*none\.json.*No such file"):
        from_file(str(tmp_path / "none.json"))
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
