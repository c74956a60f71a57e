"""Tables: what is wrong is told with file and line, or left out within a budget; data sets, weights, limits."""

import csv
import json
from functools import partial

import pytest
import torch

from helpers import make_trainer
from lit_transformer import ClassificationData, LitClassifier, SequencePairData, TransformerConfig
from lit_transformer.data.tables.read import Columns, read_files
from lit_transformer.data.tables.records import BadRecords
from lit_transformer.errors import UsageError

ROWS = [(f"word {i} of it", "odd" if i % 3 == 1 else "even") for i in range(40)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def table(path, rows=ROWS, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def read(path, most=0, weight=None):
    bad = BadRecords(most)
    columns = Columns("text_column and label_column", "text", "label", weight)
    return read_files(path, columns, bad), bad


def ready(kind=ClassificationData, **options):
    data = kind(**{"batch_size": 4, **options})
    data.setup()
    return data


BAD = {
    "wide": ("a.tsv", b"text\tlabel\na\tx\nb\ty\tz\nc\tx\n", r"expected 2 fields in line 3 of .*a\.tsv, got 3"),
    "narrow": ("a.csv", b"text,label\na,x\n\nb\nc,x\n", r"expected 2 fields in line 4 of .*a\.csv, got 1"),
    "bytes": (
        "a.csv",
        b'text,label\na,x\n"two\nlin\xe9es",x\nc,x\n',
        r"UTF-8 in lines 3 to 4 of .*a\.csv, got byte 0xe9 at position 23 of the file \(invalid continuation byte\)",
    ),
    "mark": (
        "a.csv",
        b"\xef\xbb\xbftext,label\na,x\n\xff,x\nc,x\n",
        r"in line 3 of .*a\.csv, got byte 0xff at position 18 of the file",
    ),
    "empty": ("a.csv", b'text,label\na,x\n"",x\nc,x\n', r"got no 'text' in line 3 of .*a\.csv"),
    "zero": ("a.csv", b"text,label\na,x\nb\0b,x\nc,x\n", r"expected a text as 'text' in line 3 of .*, got a zero byte"),
    "null": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n\n{"text": "b", "label": null}\n{"text": "c", "label": "x"}\n',
        r"got no 'label' in line 3 of .*a\.jsonl\.",
    ),
    "absent": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b", "lable": "y"}\n{"text": "c", "label": "x"}\n',
        r"got no 'label' in line 2 of .*a\.jsonl, which has 'text', 'lable'; set text_column and label_column",
    ),
    "json": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "b", \n{"text": "c", "label": "x"}\n',
        r"expected a JSON object in line 2 of .*a\.jsonl, got '\{\"text\": \"b\",': Expecting property name",
    ),
    "list": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n[1]\n{"text": "c", "label": "x"}\n',
        r"a JSON object in line 2 of .*, got '\[1\]'",
    ),
    "nested": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": ["{b}"], "label": "x"}\n{"text": "c", "label": "x"}\n',
        r"expected a text as 'text' in line 2 of .*a\.jsonl, got a list",
    ),
    "surrogate": (
        "a.jsonl",
        b'{"text": "a", "label": "x"}\n{"text": "\\ud800", "label": "x"}\n{"text": "c", "label": "x"}\n',
        r"in line 2 of .*, got a zero byte or half a surrogate pair",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_a_bad_record_is_named_or_left_out(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(UsageError, match=message + r".*set max_bad_records"):
        read(path)
    records, bad = read(path, most=1)
    assert list(records) == [("a", "x"), ("c", "x")]
    assert bad.describe().startswith("1 bad record left out: expected ")
    assert records.place(0) == f"line {1 if name.endswith('l') else 2} of {path}"


def test_what_is_wrong_with_a_whole_file(tmp_path):
    for content, message in (
        (b"", r"expected rows in .*a\.csv, got an empty file"),
        (b"text,label\n", r"expected rows in .*a\.csv, got none"),
        (b"t\xe9xt,label\na,x\n", r"UTF-8 in the header of .*a\.csv, got byte 0xe9 at position 1"),
        (b"text,text,label\na,b,x\n", r"expected one column 'text' in .*a\.csv, got 'text', 'text', 'label'"),
        (b'text,label\na,x\n"b,y\nc,x\n', r"the quote that is opened in line 3 of .*a\.csv to be closed"),
    ):
        with pytest.raises(UsageError, match=message):
            read(write(tmp_path / "a.csv", content), most=9)
    with pytest.raises(UsageError, match=r"expected rows in .*a\.jsonl, got an empty file"):
        read(write(tmp_path / "a.jsonl", b""))
    with pytest.raises(UsageError, match=r"expected JSON in .*a\.json: a list of objects, or .* got Expecting value"):
        read(write(tmp_path / "a.json", '[{"text": "a"},'))
    with pytest.raises(UsageError, match=r"b\.parquet cannot be read as parquet"):
        read(write(tmp_path / "b.parquet", b"no such thing"))


def test_values_are_read_as_they_are_written(tmp_path):
    long = "x" * 200_000
    content = f'\ufefftext,label\r\nNA,01\r\n"a ""b""\nc",1.50\r\n5" pipe,true\r\n{long},nan\r\n'
    records, _ = read(write(tmp_path / "a.csv", content))
    assert list(records) == [("NA", "01"), ('a "b"\nc', "1.50"), ('5" pipe', "true"), (long, "nan")]
    assert records.number == [2, 3, 5, 6]
    assert csv.field_size_limit() == 131_072
    first, second = write(tmp_path / "a.csv", "text,label\na,x\n"), write(tmp_path / "b.csv", "text,label\na,x\nb,\n")
    with pytest.raises(UsageError, match=r"got no 'label' in line 3 of .*b\.csv"):
        read([second, first])


def test_a_list_of_json_objects_is_read_too(tmp_path):
    path = write(tmp_path / "a.json", '\n [{"text": "a", "label": 1}, 2,\n{"text": "b"}, {"text": "c", "label": "x"}]')
    records, bad = read(path, most=2)
    assert list(records) == [("a", "1"), ("c", "x")]
    assert records.place(1) == f"item 4 of {path}"
    assert f"as item 2 of {path}, got '2'; expected a value in each column, got no 'label' in item 3" in bad.describe()


def test_the_budget_is_for_all_files_and_is_reported(tmp_path):
    train = table(tmp_path / "a.csv", [*ROWS, ("", "odd"), ("b", "")])
    other = table(tmp_path / "b.csv", [*ROWS[:4], ("c",)])
    clean = ready(files=table(tmp_path / "c.csv"))
    data = ready(files=train, val_files=other, max_bad_records=3)
    assert [len(split) for split in data.samples.values()] == [36, 4, 4]
    said = data.describe()
    assert "3 bad records left out: expected a value in each column, got no 'text' in line 42 of " in said
    assert "expected 2 fields in line 6 of " in said
    assert clean.samples["train"].sources == ready(files=train, max_bad_records=2).samples["train"].sources
    with pytest.raises(
        UsageError, match=r"at most max_bad_records=2 records .* line 6 of .*b\.csv.* Those before: .*42"
    ):
        ready(files=train, val_files=other, max_bad_records=2)
    assert len(said.splitlines()) == 3  # and the sizes of the splits, and padding
    with pytest.raises(UsageError, match="max_bad_records must be at least 0, got -1"):
        ClassificationData(max_bad_records=-1)


@pytest.mark.parametrize("kind", [ClassificationData, SequencePairData])
def test_what_is_too_long_is_cut_off_or_refused(tmp_path, kind):
    files = table(tmp_path / "a.csv", [*ROWS, ("w" * 21, "odd")])
    settings = {"files": files, "max_length": 20, "val_files": table(tmp_path / "b.csv")}
    if kind is SequencePairData:
        settings |= {"source_column": "text", "target_column": "label", "max_target_length": 5}
    assert " at 20 tokens" in ready(kind, **settings, test_fraction=0.02).describe()
    what = "texts" if kind is ClassificationData else "sources"
    message = (
        rf"expected {what} of at most max_length=20 tokens, as too_long=refuse says, got 21 in line 42 of .*a\.csv"
    )
    with pytest.raises(UsageError, match=message):
        ready(kind, **settings, too_long="refuse")
    data = ready(kind, **settings, too_long="refuse", max_bad_records=1)
    assert "1 bad record left out: " in data.describe()
    assert "cut off" not in data.describe()
    assert sum(map(len, data.samples.values())) == 80
    if kind is SequencePairData:
        with pytest.raises(
            UsageError, match=r"expected targets of at most max_target_length=4 tokens.* got 5 in line 2"
        ):
            ready(kind, **settings | {"max_length": 99, "max_target_length": 4}, too_long="refuse")
    with pytest.raises(UsageError, match="too_long must be 'truncate' or 'refuse', got 'cut'"):
        kind(too_long="cut")


def test_weights_of_samples_and_of_classes(tmp_path):
    rows = [(text, label, 1 + i) for i, (text, label) in enumerate(ROWS)]
    files = table(tmp_path / "a.csv", rows, ("text", "label", "w"))
    others = {"files": files, "val_files": files, "test_files": files}

    def weights(**options):
        data = ready(**others, **options)
        assert all("sample_weights" not in batch for batch in data.val_dataloader())
        found = {}
        for batch in data.train_dataloader():
            found |= dict(zip(batch["sample_ids"].tolist(), batch["sample_weights"].tolist(), strict=True))
        return data, [found[i] for i in range(40)]

    first, own = weights(weight_column="w")
    assert own == list(range(1, 41))
    # 13 odd ones and 27 even ones: 40 / (2 * 13) and 40 / (2 * 27)
    by_class = [40 / 26 if label == "odd" else 40 / 54 for _, label in ROWS]
    assert weights(class_weights="balanced")[1] == pytest.approx(by_class)
    assert weights(class_weights={"odd": 3.0})[1] == [3 if label == "odd" else 1 for _, label in ROWS]
    _, both = weights(weight_column="w", class_weights="balanced")
    assert both == pytest.approx([a * b for a, b in zip(own, by_class, strict=True)])
    with pytest.raises(UsageError, match="place in the data is for weights="):
        weights(class_weights="balanced")[0].load_state_dict(first.state_dict())
    old = {key: value for key, value in first.state_dict().items() if key not in ("weights", "labels")}
    weights(class_weights="balanced")[0].load_state_dict(old)  # of before there were any
    pairs = ready(SequencePairData, **others, source_column="text", target_column="label", weight_column="w")
    batch = next(iter(pairs.train_dataloader()))
    assert batch["sample_weights"].tolist() == [1 + i for i in batch["sample_ids"].tolist()]
    assert batch["sample_weights"].dtype == torch.float32


def test_what_is_learned_of_weighted_classes(tmp_path):
    """Thirty times a and ten times b for the same text, which counts nine times: 90 / (30 + 90) is b's share."""
    rows = [("text", "b" if i % 4 == 0 else "a") for i in range(40)]
    files = table(tmp_path / "a.csv", rows)
    data = ClassificationData(
        files=files, val_files=files, test_files=files, class_weights={"b": 9.0}, batch_size=40, max_length=8
    )
    config = TransformerConfig(vocab_size=256, max_length=8, d_model=16, n_layers=1, n_heads=2)
    task = LitClassifier(config, ["a", "b"], optimizer=partial(torch.optim.AdamW, lr=1e-2), schedule=None)
    trainer = make_trainer(default_root_dir=tmp_path, max_steps=60, limit_val_batches=0)
    trainer.fit(task, datamodule=data)
    found = trainer.predict(task, datamodule=data)[0]
    assert found["label"] == ["b"] * 40
    assert found["probability"].tolist() == pytest.approx([0.75] * 40, abs=0.02)


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "much", ""])
def test_what_is_no_weight(tmp_path, weight):
    files = table(tmp_path / "a.csv", [*((*row, 1) for row in ROWS), ("a", "odd", weight)], ("text", "label", "w"))
    with pytest.raises(UsageError, match=r"(a weight of at least 0|got no 'w') in line 42 of .*a\.csv"):
        ready(files=files, weight_column="w")


def test_class_weights_that_fit_nothing(tmp_path):
    files = table(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="class_weights has 'od', which is no class: even, odd"):
        ready(files=files, class_weights={"od": 2.0})
    numbers = table(tmp_path / "b.csv", [(text, len(label) - 3) for text, label in ROWS])
    assert set(ready(files=numbers, class_weights={0: 2.0})._splits["train"].weights) == {1.0, 2.0}
    with pytest.raises(UsageError, match="class_weights must be at least 0, got -1 for 'odd'"):
        ready(files=files, class_weights={"odd": -1})
    with pytest.raises(UsageError, match="class_weights must be 'balanced', a weight by class, or null, got 'even'"):
        ready(files=files, class_weights="even")
    with pytest.raises(UsageError, match="expected training samples that count, got weights that are all 0"):
        ready(files=files, class_weights={"odd": 0, "even": 0})
    with pytest.raises(
        UsageError, match=r"expected a column 'w' in .*; set text_column and label_column and weight_column"
    ):
        ready(files=files, weight_column="w")


@pytest.fixture
def saved(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["even", "odd"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": [text for text, _ in ROWS], "label": [label == "odd" for _, label in ROWS]}
    rows["label"] = list(map(int, rows["label"]))
    whole = datasets.Dataset.from_dict(rows, features)
    unlabelled = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features)
    both = datasets.DatasetDict({"train": whole, "dev": whole.select(range(8)), "test": unlabelled})
    both.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_data_sets_of_hugging_face(tmp_path, saved, monkeypatch):
    splits = {"train": "train", "validation": "dev"}
    data = ready(dataset=saved, dataset_splits=splits)
    assert data.labels == ["even", "odd"]
    assert {name: len(records) for name, records in data.samples.items()} == {"train": 36, "validation": 8, "test": 4}
    assert list(data.samples["validation"]) == ROWS[:8]
    assert data.describe().splitlines()[0] == f"2 classes of {saved}, samples: train 36, validation 8, test 4"
    with pytest.raises(UsageError, match=r"got no 'label' in row 1 of .*saved \(test\)"):
        ready(dataset=saved)
    with pytest.raises(UsageError, match=r"split 'val' of .*saved for validation, got 'train', 'dev', 'test'"):
        ready(dataset=saved, dataset_splits={"train": "train", "validation": "val"})
    (tmp_path / "folder").mkdir()
    table(tmp_path / "folder" / "train.csv")
    assert next(iter(ready(dataset=str(tmp_path / "folder")).samples["train"])) in ROWS
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UsageError, match="no data set nobody/nothing can be loaded: not on the hub or in its cache, and"
    ):
        ready(dataset="nobody/nothing")
    for settings, message in (
        ({"dataset": saved, "files": "a.csv"}, "are both given to train on"),
        ({"dataset_splits": splits}, "are about a dataset, and none is set"),
        ({"dataset": saved, "dataset_splits": {"dev": "dev"}}, "for train, validation and test, got one for 'dev'"),
    ):
        with pytest.raises(UsageError, match=message):
            ClassificationData(**settings)


def test_tokens_per_batch(tmp_path):
    rows = [("a" * (10 if i % 2 else 30), "ab"[i % 4 // 2]) for i in range(80)]
    files = table(tmp_path / "a.csv", rows)
    settings = {"files": files, "val_files": files, "test_files": files}
    assert ready(**settings).tokens_per_batch == 4 * 20
    # Ten texts of 30 tokens fill a batch of 300, or thirty of 10: four batches and two for 1,600 tokens
    assert ready(**settings, max_tokens=300).tokens_per_batch == 267
    pairs = {"source_column": "text", "target_column": "label"}
    assert ready(SequencePairData, **settings, **pairs).tokens_per_batch == 4 * (20 + 2)
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    assert ready(**settings | {"files": write(tmp_path / "a.jsonl", lines)}).tokens_per_batch == 80
