from pathlib import Path

import pytest

from lit_transformer.data.text import corpus
from lit_transformer.data.text.excerpt import Excerpt
from lit_transformer.data.text.splits import split_documents
from lit_transformer.errors import UsageError

HELD_OUT = {"validation": 0.05, "test": 0.05}


def size(documents):
    return sum(map(len, documents.values()))


def test_standard_library_is_split_by_file_into_disjoint_parts():
    documents = corpus.read(corpus.standard_library())
    splits = split_documents(documents, HELD_OUT)
    assert sorted(name for part in splits.values() for name in part) == sorted(documents)
    assert "argparse.py" in documents
    assert not {"site-packages", "dist-packages", "test", "tests"} & {
        part for name in documents for part in name.split("/")
    }
    assert size(splits["train"]) > 6_000_000
    assert 400_000 < size(splits["validation"]) < 700_000
    assert 400_000 < size(splits["test"]) < 700_000


def test_python_without_source_asks_for_files(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match=r"got no \.py file: .* Pass files="):
        corpus.standard_library()


def test_a_file_of_python_that_is_no_utf8_is_left_out_and_one_of_the_users_is_not(tmp_path):
    for name, content in {"a.py": b"x = 1", "b.py": "caf\xe9".encode("latin-1"), "c.py": b"\0"}.items():
        (tmp_path / name).write_bytes(content)
    paths = sorted(tmp_path.iterdir())
    assert corpus.read(paths, leave_out_others=True) == {"a.py": b"x = 1"}
    with pytest.raises(UsageError, match=r"b\.py"):
        corpus.read(paths)


def test_globs_are_sorted_and_each_file_counts_once(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "d.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    found = corpus.find([str(tmp_path / "**/*.txt"), str(tmp_path / "a.txt")])
    assert [path.name for path in found] == ["a.txt", "b.txt", "c.txt"]
    assert list(corpus.read(found)) == ["a.txt", "b.txt", "deep/er/c.txt"]


def test_a_relative_glob(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in corpus.find("*.txt")] == ["a.txt"]


def test_names_do_not_depend_on_where_the_folder_is(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.txt").write_text("a")
    here, there = (corpus.read(corpus.find(str(tmp_path / place / "*"))) for place in ("here", "there"))
    assert here == there


def test_paths_that_match_nothing(tmp_path):
    with pytest.raises(UsageError, match=r"got '.*/missing\.txt'\. Check the spelling"):
        corpus.find(str(tmp_path / "missing.txt"))
    with pytest.raises(UsageError, match=r"got '.*/\*\.txt'\. Check the spelling"):
        corpus.find([str(tmp_path / "*.txt")])
    with pytest.raises(UsageError, match=r"got the folder .* Write .*/\*\*/\*\.txt"):
        corpus.find(str(tmp_path))
    with pytest.raises(UsageError, match="got an empty list"):
        corpus.find([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 au lait", r"got invalid continuation byte at byte 3, in line 1, of .*bad\.txt"),
        (b"PK\x03\x00", r"got a zero byte at position 3, in line 1, of .*bad\.txt: it is binary, or UTF-16"),
        ("text".encode("utf-16-le"), r"got a zero byte at position 1"),
        (b"", r"got 1 empty file\(s\), the first of them .*bad\.txt"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        corpus.read([path])


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UsageError, match=r"a\.txt cannot be read: Permission denied"):
        corpus.read([tmp_path / "a.txt"])


def test_as_many_bad_files_as_are_allowed_are_left_out(tmp_path):
    for name, content in {"a.txt": b"one", "b.txt": b"\xff", "c.txt": b"a\n\0", "d.txt": b"two\n"}.items():
        (tmp_path / name).write_bytes(content)
    paths = sorted(tmp_path.iterdir())
    documents, bad = corpus.check(paths, max_bad=2)
    assert {name: (len(text), "".join(text.pieces())) for name, text in documents.items()} == {
        "a.txt": (3, "one"),
        "d.txt": (4, "two\n"),
    }
    assert ["b.txt" in bad[0], "in line 2, of" in bad[1]] == [True, True]
    with pytest.raises(UsageError, match=r"position 2.*c\.txt.* bad file 2, more than were allowed"):
        corpus.check(paths, max_bad=1)
    with pytest.raises(UsageError, match=r"got 2 bad or empty file\(s\), expected UTF-8 text, got invalid start byte"):
        corpus.check(paths[1:3], max_bad=5)


def test_splits_of_what_is_read_piece_by_piece_are_those_of_bytes(tmp_path):
    contents = {f"{i}.txt": ("né" * i + "日本🎉" * (i % 3)).encode() for i in range(1, 25)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for count in (3, 24):  # by position, and by file
        some = dict(list(contents.items())[:count])
        documents = {name: Excerpt(tmp_path / name, 0, len(content)) for name, content in some.items()}
        for fraction in (0.11, 0.2, 0.35):
            held_out = {"validation": fraction, "test": fraction}
            found = {
                split: {name: "".join(text.pieces()).encode() for name, text in part.items()}
                for split, part in split_documents(documents, held_out).items()
            }
            assert found == split_documents(some, held_out)


def test_twenty_files_are_split_by_file_and_a_new_file_moves_few_of_them():
    documents = {f"{i}.txt": b"x" * 100 for i in range(40)}
    splits = split_documents(documents, HELD_OUT)
    assert [len(part) for part in splits.values()] == [36, 2, 2]
    more = split_documents(documents | {"new.txt": b"x" * 100}, HELD_OUT)
    assert len(set(splits["train"]) ^ set(more["train"])) <= 3


def test_fewer_files_are_split_by_position_between_characters():
    documents = {"a": "ä" * 30, "b": "é" * 30}
    splits = split_documents({name: text.encode() for name, text in documents.items()}, {"validation": 0.21})
    assert list(splits) == ["train", "validation"]
    assert list(splits["validation"]) == ["b"]
    joined = b"".join(content for part in splits.values() for content in part.values())
    assert joined.decode() == "ä" * 30 + "é" * 30
    assert splits["validation"]["b"].decode() == "é" * 13


def test_nothing_is_held_out_when_nothing_is_asked():
    documents = {"a": b"text"}
    assert split_documents(documents, {}) == {"train": documents}
