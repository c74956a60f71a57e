"""Texts and classes: embedded and from tables, padded, resumable; what is wrong is named."""

import csv
import json

import pytest
import torch

from hf_models import save_bert
from lit_transformer import ClassificationData
from lit_transformer.data.tables.read import Columns, read_files
from lit_transformer.data.tables.records import BadRecords
from lit_transformer.errors import UsageError

ROWS = [(f"w{i % 40} w{(3 * i) % 40}" + " w1" * (i % 5), "odd" if i % 3 == 1 else "even") for i in range(60)]


def write(path, rows=ROWS, header=("text", "label"), **options):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, **options)
        writer.writerows([header, *rows])
    return str(path)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def ready(**options):
    data = ClassificationData(**{"batch_size": 4, **options})
    data.setup()
    return data


def read(path):
    return list(read_files(str(path), Columns("text_column and label_column", "text", "label"), BadRecords()))


def test_formats_say_the_same(tmp_path):
    import pandas

    assert read(write(tmp_path / "a.csv")) == ROWS
    assert read(write(tmp_path / "a.tsv", delimiter="\t")) == ROWS
    lines = "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    assert read(tmp_path / "a.jsonl") == ROWS
    pandas.DataFrame(ROWS, columns=["text", "label"]).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ROWS


def test_batches_are_padded_and_masked(tmp_path):
    data = ready(files=write(tmp_path / "a.csv"), max_length=12)
    batch = next(iter(data.val_dataloader()))
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape[1] == lengths.max() <= 12
    for ids, length in zip(batch["input_ids"], lengths, strict=True):
        assert (ids[:length] > 0).all()
        assert (ids[length:] == 0).all()
    assert data.labels == ["even", "odd"]
    assert batch["targets"].dtype == torch.int64
    assert data.describe().splitlines()[1] == f"cut off: {sum(len(text) > 12 for text, _ in ROWS)} texts at 12 tokens"


def test_the_same_share_of_each_class_is_held_out(tmp_path):
    data = ready(files=write(tmp_path / "a.csv"), val_fraction=0.2, test_fraction=0.1)
    assert data.class_counts() == {"even": 28, "odd": 14}
    targets = torch.cat([batch["targets"] for batch in data.val_dataloader()])
    assert targets.bincount().tolist() == [8, 4]


def test_a_hugging_face_tokenizer_adds_its_special_tokens(tmp_path):
    data = ready(files=write(tmp_path / "a.csv"), tokenizer=save_bert(tmp_path / "bert"), max_length=6)
    assert data.vocab_size == 50
    batch = next(iter(data.train_dataloader()))
    assert (batch["input_ids"][:, 0] == 2).all()  # [CLS]
    assert sorted(
        {int(ids[n - 1]) for ids, n in zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True)}
    ) == [3]
    assert data._cut.total() == sum(len(text.split()) > 4 for text, _ in ROWS)


def test_the_embedded_task_has_every_class_in_every_split():
    data = ready()
    assert len(data.labels) == 8
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert len(torch.cat([batch["targets"] for batch in loader]).unique()) == 8


def test_the_position_is_resumed_and_excluded_samples_stay_away(tmp_path):
    files = write(tmp_path / "a.csv")
    first = ready(files=files)
    batches = iter(first.train_dataloader())
    for _ in range(3):
        next(batches)
    state = first.state_dict()
    expected = [batch["sample_ids"].tolist() for batch in batches]
    second = ready(files=files)
    second.load_state_dict(state)
    assert [
        batch["sample_ids"].tolist() for _, batch in zip(expected, second.train_dataloader(), strict=False)
    ] == expected
    second.exclude([0, 1, 2])
    assert not {0, 1, 2} & {i for batch in second.train_dataloader() for i in batch["sample_ids"].tolist()}
    with pytest.raises(UsageError, match="place in the data is for digest"):
        ready(files=files, max_length=3).load_state_dict(state)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (ROWS, ("body", "label"), "expected a column 'text' in .*a.csv, got 'body', 'label'; set text_column"),
        ([*ROWS, ("w1", "")], ("text", "label"), "got no .label. in line 62 of .*a.csv"),
        ([(text, "a") for text, _ in ROWS], ("text", "label"), "at least two classes, got a"),
    ],
)
def test_what_is_wrong_with_a_table(tmp_path, rows, header, message):
    with pytest.raises(UsageError, match=message):
        ready(files=write(tmp_path / "a.csv", rows, header))


def test_other_things_that_are_wrong(tmp_path):
    files = write(tmp_path / "a.csv")
    other = write(tmp_path / "b.csv", [("w1", "neither")])
    with pytest.raises(UsageError, match=r"line 2 of .*b\.csv has the class 'neither', which training has not"):
        ready(files=files, val_files=other)
    with pytest.raises(UsageError, match="expected files that all end in one of"):
        ready(files=[files, write(tmp_path / "c.tsv", delimiter="\t")])
    with pytest.raises(UsageError, match="expected tokenizer to be 'bytes'"):
        ready(files=files, tokenizer="byte")
    (tmp_path / "d.csv").write_bytes(b"")
    with pytest.raises(UsageError, match=r"expected rows in .*d\.csv, got an empty file"):
        ready(files=str(tmp_path / "d.csv"))
    with pytest.raises(UsageError, match=r"expected rows in .*e\.csv, got none"):
        ready(files=write(tmp_path / "e.csv", []))
    with pytest.raises(UsageError, match="max_length must be at least 1, got 0"):
        ClassificationData(max_length=0)
    with pytest.raises(UsageError, match="leave something to train on"):
        ClassificationData(val_fraction=0.6, test_fraction=0.4)
