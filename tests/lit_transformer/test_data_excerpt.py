"""Text read in pieces: the bytes of the file, the tokens of the whole, and errors at the right place."""

import random

import pytest
from tokenizers import Regex
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from lit_transformer.data.text import excerpt
from lit_transformer.data.text.excerpt import Excerpt
from lit_transformer.data.tokenizer import BPETokenizer, UnigramTokenizer
from lit_transformer.errors import UsageError

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "GPT-2": ByteLevel(add_prefix_space=False),
    "Llama 3": Sequence([Split(Regex(LLAMA_3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
    "GPT-4o": Sequence([Split(Regex(GPT_4O), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
}
PARTS = [
    "a",
    "B",
    "word",
    "'s",
    "'",
    "12345",
    "²",
    "_",
    ";",
    "...",
    "/",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
    "é",
    "e\u0301",
]
PARTS += ["日本", "。", "🎉", "\u00a0", "\u3000", "\u0301", "\u1e9b\u0323"]


def nasty(seed, count=300):
    return "".join(random.Random(seed).choices(PARTS, k=count))


@pytest.fixture
def write(tmp_path):
    def build(content):
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "text.txt").write_bytes(content)
        return Excerpt(tmp_path / "text.txt", 0, len(content))

    return build


def words(pattern, text):
    return [word for word, _ in PATTERNS[pattern].pre_tokenize_str(text)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_are_split_into_the_words_of_the_whole(write, monkeypatch, pattern):
    monkeypatch.setattr(excerpt, "_READ", 7)
    for seed in range(60):
        text = nasty(seed)
        pieces = list(write(text).pieces())
        assert len(pieces) > 5
        assert "".join(pieces) == text
        assert [word for piece in pieces for word in words(pattern, piece)] == words(pattern, text)
        assert "".join(map(NFC().normalize_str, pieces)) == NFC().normalize_str(text)


@pytest.mark.parametrize(
    ("pattern", "left", "right"),
    [("GPT-2", "one \n", "two"), ("Llama 3", "one;", "\ntwo"), ("GPT-4o", "one", "'s two"), ("GPT-4o", "\n", "\n two")],
)
def test_other_places_would_not_do(pattern, left, right):
    assert words(pattern, left) + words(pattern, right) != words(pattern, left + right)


@pytest.mark.parametrize("kind", [BPETokenizer, UnigramTokenizer])
def test_tokens_are_those_of_the_whole(write, monkeypatch, kind):
    texts = [nasty(seed, 1000) for seed in range(20)]
    monkeypatch.setattr(excerpt, "_READ", 11)
    tokenizer = kind.train(texts, 300)
    pieces = [piece for text in texts for piece in write(text).pieces()]
    assert kind.train(iter(pieces), 300).to_json() == tokenizer.to_json()
    for text in texts:
        ids = [i for piece in write(text).pieces() for i in tokenizer.encode(piece)]
        assert ids == tokenizer.encode(text).tolist()


def test_pieces_are_short(write):
    lengths = [len(piece) for piece in write("many words in a line\n" * 10_000).pieces()]
    assert sum(lengths) == 210_000
    assert max(lengths) <= 2 * excerpt._READ


def test_what_fits_into_one_read_is_one_piece(write):
    assert list(write("two words").pieces()) == ["two words"]
    assert list(write("").pieces()) == []


def test_without_words_a_piece_ends_anywhere_between_characters(write, monkeypatch):
    monkeypatch.setattr(excerpt, "_READ", 4)
    monkeypatch.setattr(excerpt, "_LONGEST", 6)
    pieces = list(write("日本語。" * 10).pieces())
    assert "".join(pieces) == "日本語。" * 10
    assert {len(piece) for piece in pieces[:-1]} <= {6, 7}


def test_indices_and_slices_are_those_of_bytes(write):
    content = "häuser".encode()
    text = write(content)
    assert [text[i] for i in range(len(text))] == list(content)
    for start, stop in [(0, 3), (3, None), (0, 100), (5, 2)]:
        part = text[start:stop]
        assert len(part) == len(content[start:stop])
        assert "".join(part.pieces()) == content[start:stop].decode()
    assert "".join(text[1:][2:4].pieces()) == content[1:][2:4].decode()


@pytest.mark.parametrize("place", [0, 3, 4, 5, 6, 7, 12, 13, 14])
@pytest.mark.parametrize(
    ("bad", "reason"), [(b"\xff", "invalid start byte"), (b"\0", "a zero byte"), (b"\xf0\x9f", "inv")]
)
def test_a_bad_byte_is_named_wherever_it_is_in_what_is_read(write, monkeypatch, place, bad, reason):
    monkeypatch.setattr(excerpt, "_READ", 4)
    content = b"a\nb\nc\nd\ne\nf\ng\nh\n"
    text = write(content[:place] + bad + content[place:])
    line = 1 + content[:place].count(b"\n")
    with pytest.raises(UsageError, match=rf"{reason}.* at (byte|position) {place}, in line {line}, of .*text\.txt"):
        list(text.decoded())


def test_half_a_character_at_the_end(write):
    with pytest.raises(UsageError, match=r"got unexpected end of data at byte 4, in line 2, of"):
        list(write("né\n🎉".encode()[:-1]).decoded())
