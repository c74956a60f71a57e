import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lit_transformer.data.text import corpus, excerpt, unfinished
from lit_transformer.data.text.cache import Recipe, prepare
from lit_transformer.data.text.splits import split_documents
from lit_transformer.data.tokenizer import BPETokenizer, ByteTokenizer
from lit_transformer.errors import UsageError


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of the text, with an é\n" for i in range(300)))
    return path


def recipe(text, **changes):
    settings = {"files": str(text), "val_files": None, "test_files": None, "val_fraction": 0.1, "test_fraction": 0.1}
    settings |= {"tokenizer": "bytes", "bpe_vocab_size": 290}
    return Recipe(**(settings | changes))


def some_texts(count):
    return {f"{i:02d}.txt": f"{i} naïve don't (x) =\n\n  日本。🎉 {i * i}; \n end" * i for i in range(count)}


def refuse(*_):
    raise AssertionError("text was read again")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "unigram"])
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


@pytest.mark.parametrize(
    ("count", "corpus_hash", "tokens_hash", "tokens"),
    [
        (6, "fcca2608fbe00602", "e5fd80666f245f8f", {"train": 493, "validation": 72, "test": 141}),  # split by position
        (25, "3a437119a7a0ef29", "e6b762beda11b400", {"train": 9823, "validation": 1864, "test": 2941}),  # by file
    ],
)
def test_splits_tokens_and_hash_are_those_of_text_in_memory(
    tmp_path, monkeypatch, count, corpus_hash, tokens_hash, tokens
):
    # The numbers are those of a release that held all text in memory: what it began can be resumed.
    monkeypatch.setattr(excerpt, "_READ", 13)
    for name, content in some_texts(count).items():
        (tmp_path / name).write_text(content)
    settings = {"files": str(tmp_path / "*.txt"), "test_fraction": 0.2}
    prepared = prepare(recipe("", **settings), str(tmp_path / "cache"))
    arrays = [np.load(prepared.folder / f"{name}.npy") for name in tokens]
    assert prepared.corpus_hash[:16] == corpus_hash
    assert {name: split.tokens for name, split in prepared.splits.items()} == tokens
    assert hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16] == tokens_hash
    by_bpe = prepare(recipe("", tokenizer="bpe", **settings), str(tmp_path / "cache"))
    documents = {name: text for name, text in some_texts(count).items() if text}
    wholes = split_documents(
        {name: text.encode() for name, text in documents.items()}, {"validation": 0.1, "test": 0.2}
    )
    bpe = BPETokenizer.train([content.decode() for content in wholes["train"].values()], 290)
    assert by_bpe.tokenizer.to_json() == bpe.to_json()
    for name, part in wholes.items():
        ids = [[*bpe.encode(content.decode()).tolist(), 0] for content in part.values()]
        assert np.load(by_bpe.folder / f"{name}.npy").tolist() == [i for document in ids for i in document]
        lengths = [len(document) for document in ids]
        assert np.diff(np.load(by_bpe.folder / f"{name}.documents.npy")).tolist() == lengths


def test_hash_is_of_names_contents_and_split(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text(f"é {name}")
    files = {key: str(tmp_path / f"{name}.txt") for key, name in [("val_files", "validation"), ("test_files", "test")]}
    prepared = prepare(recipe(tmp_path / "train.txt", **files), str(tmp_path / "cache"))
    text = b"train\0train.txt\x008\0\xc3\xa9 trainvalidation\0validation.txt\x0013\0\xc3\xa9 validation"
    assert prepared.corpus_hash == hashlib.sha256(text + b"test\0test.txt\x007\0\xc3\xa9 test").hexdigest()


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


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "unigram"])
def test_second_time_reads_no_text(tmp_path, text, monkeypatch, tokenizer):
    first = prepare(recipe(text, tokenizer=tokenizer), str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "check", refuse)
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
        patch.setattr(unfinished, "_publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe(text), str(root))
    assert list(root.iterdir()) == []
    (root / ".killed").mkdir()  # what a kill leaves behind
    assert prepare(recipe(text), str(root)).splits["train"].tokens > 0


def test_whoever_comes_second_takes_what_the_first_has_written(tmp_path, text, monkeypatch):
    root = tmp_path / "cache"
    publish = unfinished._publish

    def beaten(partial, folder):
        monkeypatch.setattr(unfinished, "_publish", publish)
        prepare(recipe(text), str(root))
        publish(partial, folder)

    monkeypatch.setattr(unfinished, "_publish", beaten)
    prepared = prepare(recipe(text), str(root))
    assert [path.name for path in root.iterdir()] == [prepared.folder.name]


def test_two_processes_at_once_agree_and_only_what_a_dead_one_left_is_removed(tmp_path, text):
    root, other = tmp_path / "cache", tmp_path / "other.txt"
    other.write_text(text.read_text() + "more")
    worker = Path(__file__).with_name("cache_worker.py")
    command = [sys.executable, str(worker), str(root), str(text), str(other)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "waiting\n"  # all is written but the name
            first = prepare(recipe(text, tokenizer="bpe"), str(root))
            assert len(list(root.glob("*.unfinished"))) == 1  # it lives
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{first.folder.name} {first.corpus_hash}\n"
            assert process.stdout.readline() == "waiting\n"
            half, *others = root.glob("*.unfinished")
            assert others == []
            prepare(recipe(text, val_fraction=0.2), str(root))
            assert (half / "train.npy").exists()
        finally:
            process.kill()
    prepare(recipe(text, val_fraction=0.3), str(root))
    assert not half.exists()
    assert all((folder / "about.json").exists() for folder in root.iterdir())
    assert len(list(root.iterdir())) == 3


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


def test_a_file_that_changes_meanwhile_is_not_cached(tmp_path, text, monkeypatch):
    def train(*_):
        text.write_text(text.read_text() + "more")
        return ByteTokenizer()

    monkeypatch.setattr(Recipe, "build_tokenizer", train)
    with pytest.raises(UsageError, match="got one that changed meanwhile: start again"):
        prepare(recipe(text), str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_can_only_be_read_serves_what_it_has(tmp_path, text, monkeypatch):
    prepared = prepare(recipe(text), str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert prepare(recipe(text), str(tmp_path / "cache")).folder == prepared.folder


def test_bad_files_are_left_out_with_a_warning_and_counted(tmp_path, text):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "worse.txt").write_bytes(b"a\0")
    given = {"files": [str(text), str(tmp_path / "bad.txt")], "val_files": str(tmp_path / "w*.txt")}
    (tmp_path / "well.txt").write_text("validation")
    with pytest.warns(
        UserWarning, match=r"2 bad file\(s\) left out, .*invalid start byte at byte 0, in line 1, of .*bad"
    ):
        prepared = prepare(recipe("", **given, max_bad_records=2), str(tmp_path / "cache"))
    assert prepared.bad_records == 2
    assert {name: split.files for name, split in prepared.splits.items()} == {"train": 1, "validation": 1, "test": 1}
    assert prepare(recipe("", **given, max_bad_records=2), str(tmp_path / "cache")).bad_records == 2
    with pytest.raises(UsageError, match=r"a zero byte at position 1, in line 1, of .*worse"):
        prepare(recipe("", **given, max_bad_records=1), str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"invalid start byte at byte 0, in line 1, of .*bad"):
        prepare(recipe("", **given), str(tmp_path / "cache"))
