"""Whole words hidden: what a word is, as often as tokens are, the words of Hugging Face, and the same on a resume."""

import warnings
from functools import partial

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import processors
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from helpers import make_trainer
from lit_transformer import LitMaskedLM, MaskedLanguageModelingData, TransformerConfig
from lit_transformer.data.batching.loader import Blocks
from lit_transformer.data.batching.packed import PackedBlocks
from lit_transformer.data.batching.whole_words import Words
from lit_transformer.data.masked import Masked
from lit_transformer.data.tokenizer import BPETokenizer, ByteTokenizer
from lit_transformer.errors import UsageError

WORDS = ["the", "transformer", "attends", "to", "unbelievable", "words", "of", "antidisestablishment"]
PROSE = " ".join(np.random.default_rng(0).choice(WORDS, 4000))


def together(hidden):
    """A number for each place that is the same where places are always hidden together, of ``(draws, places)``."""
    assert len(hidden) >= 64  # two words that are hidden apart are alike by chance once in 2**64 times
    return np.unique(hidden, axis=1, return_inverse=True)[1].ravel()


def groups(numbers):
    """The same for partitions that are, whatever the numbers."""
    return [list(numbers).index(number) for number in numbers]


def hidden_by_ours(tmp_path, tokenizer, ids, draws=64):
    np.save(tmp_path / "a.npy", np.array([*ids, 0]))
    blocks = Masked(Blocks(tmp_path / "a.npy", len(ids)), 999, 0.5, 0, Words(tokenizer.pieces))
    batch = blocks.__getitems__(np.zeros(draws, dtype=np.int64))
    return (blocks.augment(batch, np.arange(draws))["targets"] != -100).numpy()


def test_words_of_bytes_by_hand(tmp_path):
    text = "ab3 c_d,  né—e\n2f"  # each of the characters below is a word, or a part of the one before
    found = together(hidden_by_ours(tmp_path, ByteTokenizer(), ByteTokenizer().encode(text)))
    # The dash is not ASCII, so that its bytes cannot be told from those of a letter; é is two bytes, the dash three.
    words = [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8, 8, 9, 10, 10]
    assert groups(found) == groups(words)


def test_words_of_pieces_by_hand():
    pieces = [b"", b"un", b" like", b"ly", b"\xe2\x80\x94", b"'s", b"  ", b"\n", "né".encode(), b"2", b" \xc3", b"\xa9"]
    starts = Words(pieces).starts(np.array([[1, 3, 2, 3, 9, 4, 3, 5, 6, 6, 7, 8, 0, 1, 10, 11, 3]]))
    assert starts[0].astype(int).tolist() == [1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]


def test_no_word_goes_on_in_the_next_document(tmp_path):
    np.save(tmp_path / "a.npy", np.array([*b"ab\0cd\0"]))
    np.save(tmp_path / "a.documents.npy", np.array([0, 3, 6]))
    blocks = Masked(PackedBlocks(tmp_path / "a.npy", 6), 256, 0.5, 0, Words(ByteTokenizer().pieces))
    batch = blocks.__getitems__(np.zeros(64, dtype=np.int64))
    assert batch["input_ids"][0].tolist() == [*b"abcd\0\0"]
    hidden = (blocks.augment(batch, np.arange(64))["targets"] != -100).numpy()
    assert groups(together(hidden)) == [0, 0, 2, 2, 4, 4]  # what is left over is never hidden
    assert not hidden[:, 4:].any()


def test_the_words_are_those_of_hugging_face(tmp_path):
    # Enough of each first letter, so that no space is a token of its own: theirs is part of a word then, ours is not.
    ours = BPETokenizer.train([PROSE + " t a u w o" * 4000], 290)
    ids = ours.encode(PROSE)[:80]
    assert len(set(ids)) > 15
    theirs = tokenizers.Tokenizer.from_str(ours.to_json())
    theirs.post_processor = processors.ByteLevel(trim_offsets=True)  # a space belongs to no word, as in GPT-2's
    fast = PreTrainedTokenizerFast(tokenizer_object=theirs, mask_token="<|endoftext|>", pad_token="!")
    encoded = fast(PROSE, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=True, max_length=80)
    assert encoded["input_ids"] == ids.tolist()
    collate = DataCollatorForLanguageModeling(
        fast, whole_word_mask=True, mlm_probability=0.5, mask_replace_prob=1.0, random_replace_prob=0.0,
        return_tensors="np", seed=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hidden = collate([dict(encoded) for _ in range(64)])["labels"] != -100
    assert groups(together(hidden)) == groups(together(hidden_by_ours(tmp_path, ours, ids)))
    assert 20 < len(set(together(hidden))) < 60


def ready(tmp_path, **options):
    (tmp_path / "a.txt").write_text(PROSE)
    settings = {
        "block_size": 64,
        "batch_size": 8,
        "mask_fraction": 0.2,
        "bpe_vocab_size": 290,
        "whole_words": True,
        **options,
    }
    data = MaskedLanguageModelingData(files=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"), **settings)
    data.setup()
    return data


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_as_many_tokens_are_hidden_as_bert_does_it(tmp_path, tokenizer):
    data = ready(tmp_path, tokenizer=tokenizer)
    samples = data._splits["train"]
    hidden = replaced = n = squares = 0
    for epoch in range(30):
        ids = np.arange(len(samples))
        original = samples.__getitems__(ids)
        batch = samples.augment(original, ids + epoch * len(samples))
        chosen = batch["targets"] != -100
        starts = Words(data.tokenizer.pieces).starts(original["input_ids"].numpy())
        lengths = np.bincount(np.cumsum(starts.ravel()))
        assert torch.equal(batch["targets"][chosen], original["input_ids"][chosen])
        assert torch.equal(batch["input_ids"][~chosen], original["input_ids"][~chosen])
        hidden, n, squares = hidden + int(chosen.sum()), n + chosen.numel(), squares + int((lengths**2).sum())
        replaced += int((batch["input_ids"][chosen] == data.mask_id).sum())
    assert abs(hidden / n - 0.2) < 4 * (0.2 * 0.8 * squares) ** 0.5 / n
    assert abs(replaced / hidden - 0.8) < 4 * (0.16 / hidden) ** 0.5  # token by token, as in BERT


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_fresh_each_time_and_the_same_when_resumed(tmp_path, workers):
    def read(loader, n):
        return [batch["input_ids"] for _, batch in zip(range(n), loader, strict=False)]

    whole = read(ready(tmp_path, num_workers=workers).train_dataloader(), 6)
    data = ready(tmp_path)
    read(data.train_dataloader(), 3)
    again = ready(tmp_path, num_workers=workers)
    again.load_state_dict(data.state_dict())
    assert torch.equal(torch.cat(read(again.train_dataloader(), 3)), torch.cat(whole[3:]))
    samples = data._splits["train"]
    batch = samples.__getitems__(np.array([5, 5]))
    assert (samples.augment(batch, np.array([1, 2]))["targets"] != -100).unique(dim=0).shape[0] == 2
    with pytest.raises(UsageError, match="place in the data is for whole_words=True"):
        ready(tmp_path, whole_words=False).load_state_dict(data.state_dict())
    assert "whole words at a time" in data.describe()


def test_a_model_learns_to_guess_words(tmp_path):
    data = ready(tmp_path, tokenizer="bpe", block_size=32)
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=data.vocab_size, d_model=32, n_layers=1, n_heads=2, max_length=32)
    task = LitMaskedLM(config, optimizer=partial(torch.optim.AdamW, lr=0.01), schedule=None)
    trainer = make_trainer(max_steps=20, max_epochs=-1, check_val_every_n_epoch=None, val_check_interval=20)
    trainer.fit(task, data)
    assert trainer.callback_metrics["val/loss"] < 0.8 * np.log(data.vocab_size)
