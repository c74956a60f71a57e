import multiprocessing
import os

import numpy as np
import pytest

from lit_transformer.data import cache, corpus
from lit_transformer.data.cache import Recipe, prepare
from lit_transformer.errors import UsageError


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of the text, with an é\n" for i in range(300)))
    return path


def recipe(text, **changes):
    settings = {"files": str(text), "val_files": None, "test_files": None, "val_fraction": 0.1, "test_fraction": 0.1}
    settings |= {"tokenizer": "bytes", "bpe_vocab_size": 300}
    return Recipe(**(settings | changes))


def refuse(*_):
    raise AssertionError("text was read again")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_tokens_are_the_text_each_document_ended(tmp_path, text, tokenizer):
    prepared = prepare(recipe(text, tokenizer=tokenizer), str(tmp_path / "cache"))
    decoded = ""
    for name, split in prepared.splits.items():
        tokens = np.load(prepared.folder / f"{name}.npy")
        assert tokens.dtype == np.uint16
        assert tokens[-1] == prepared.tokenizer.eos_id
        assert len(tokens) == split.tokens
        decoded += prepared.tokenizer.decode(tokens)
    assert decoded == text.read_text()
    assert sum(split.bytes for split in prepared.splits.values()) == text.stat().st_size


def test_where_each_document_begins_is_kept(tmp_path):
    for name, content in {"a.txt": "one", "b.txt": "", "c.txt": "three", "d.txt": "xy"}.items():
        (tmp_path / name).write_text(content)
    prepared = prepare(recipe(tmp_path / "*.txt", val_fraction=0.1, test_fraction=0.3), str(tmp_path / "cache"))
    # Of ten bytes the last three are for test, "e" and "xy", the one before for validation.
    starts = {name: np.load(prepared.folder / f"{name}.documents.npy") for name in prepared.splits}
    assert {name: found.tolist() for name, found in starts.items()} == {
        "train": [0, 4, 8],  # "one" and "thr", each ended
        "validation": [0, 2],  # "e"
        "test": [0, 2, 5],  # "e" and "xy"
    }
    assert {found.dtype for found in starts.values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_second_time_reads_no_text(tmp_path, text, monkeypatch, tokenizer):
    first = prepare(recipe(text, tokenizer=tokenizer), str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "read", refuse)
    second = prepare(recipe(text, tokenizer=tokenizer), str(tmp_path / "cache"))
    assert second.corpus_hash == first.corpus_hash
    assert second.splits == first.splits
    assert second.tokenizer.to_json() == first.tokenizer.to_json()


def test_changed_text_or_settings_are_prepared_again(tmp_path, text):
    folders = {prepare(recipe(text), str(tmp_path / "cache")).folder}
    folders.add(prepare(recipe(text, val_fraction=0.2), str(tmp_path / "cache")).folder)
    folders.add(prepare(recipe(text, tokenizer="bpe"), str(tmp_path / "cache")).folder)
    text.write_text(text.read_text() + "one more line\n")
    folders.add(prepare(recipe(text), str(tmp_path / "cache")).folder)
    assert len(folders) == 4


def test_splits_may_have_files_of_their_own(tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text("validation\n")
    prepared = prepare(recipe(text, val_files=str(other)), str(tmp_path / "cache"))
    assert bytes(np.load(prepared.folder / "validation.npy").astype(np.uint8)) == b"validation\n\0"
    assert prepared.splits["train"].bytes + prepared.splits["test"].bytes == text.stat().st_size


def test_a_file_that_is_held_out_is_not_trained_on(tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text("validation\n")
    both = recipe(text, val_files=str(other), files=str(tmp_path / "*.txt"))
    assert both.paths() == {"train": [text], "validation": [other]}
    with pytest.raises(
        UsageError, match=r"expected text to train on, got .* all of it validation or test text as well"
    ):
        recipe(text, test_files=str(text)).paths()


def test_interruption_leaves_nothing_that_would_be_taken_for_tokens(tmp_path, text, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    root = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe(text), str(root))
    assert list(root.iterdir()) == []
    (root / ".killed").mkdir()  # what a kill leaves behind
    assert prepare(recipe(text), str(root)).splits["train"].tokens > 0


def test_whoever_comes_second_takes_what_the_first_has_written(tmp_path, text, monkeypatch):
    root = tmp_path / "cache"
    publish = cache._publish

    def beaten(unfinished, folder):
        monkeypatch.setattr(cache, "_publish", publish)
        prepare(recipe(text), str(root))
        publish(unfinished, folder)

    monkeypatch.setattr(cache, "_publish", beaten)
    prepared = prepare(recipe(text), str(root))
    assert [path.name for path in root.iterdir()] == [prepared.folder.name]


def test_two_processes_at_once_agree(tmp_path, text):
    root = tmp_path / "cache"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, two = pool.starmap(prepare, [(recipe(text, tokenizer="bpe"), str(root))] * 2)
    assert one.folder == two.folder
    assert one.corpus_hash == two.corpus_hash
    assert [path.name for path in root.iterdir()] == [one.folder.name]


def test_a_folder_that_cannot_be_written_is_replaced_with_one_warning(tmp_path, text, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"The cache folder cannot be written .* Set cache_dir"):
        prepared = prepare(recipe(text), str(tmp_path / "file" / "cache"))
    assert prepared.folder.is_relative_to(tmp_path / "temporary")


def test_default_folder_is_the_users_cache(tmp_path, text, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepare(recipe(text)).folder.parent == tmp_path / "xdg" / "lit-transformer"


def test_bad_text_leaves_no_folder(tmp_path, text):
    os.truncate(text, 0)
    with pytest.raises(UsageError, match="empty file"):
        prepare(recipe(text), str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []
