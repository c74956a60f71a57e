"""Pairs of texts: embedded and from tables, padded, ended, resumable; what is wrong is named."""

import csv

import pytest

from hf_models import save_bert
from lit_transformer import SequencePairData
from lit_transformer.data.text.functions import docstrings
from lit_transformer.errors import UsageError

ROWS = [(f"w{i % 40} w{(3 * i) % 40}" + " w1" * (i % 5), f"w{i % 7}" * (1 + i % 3)) for i in range(60)]


def write(path, rows=ROWS, header=("source", "target")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def ready(**options):
    data = SequencePairData(**{"batch_size": 4, **options})
    data.setup()
    return data


def test_batches_are_padded_and_targets_end(tmp_path):
    data = ready(files=write(tmp_path / "a.csv"), max_length=12, max_target_length=5)
    seen = {}
    for batch in data.train_dataloader():
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == lengths.max() <= 12
        counted = batch["targets"] != -100
        assert batch["targets"].shape[1] == counted.sum(1).max() <= 5
        for i, row in enumerate(batch["targets"]):
            ids = row[counted[i]].tolist()
            assert ids[-1] == data.eos_id
            seen[int(batch["sample_ids"][i])] = data.decode(ids[:-1])
    train = data.samples["train"]
    assert all(text == train[i][1][:4] for i, text in seen.items())
    assert "cut off: " in data.describe()


def test_what_is_held_out_is_nowhere_else(tmp_path):
    data = ready(files=write(tmp_path / "a.csv"), val_fraction=0.2, test_fraction=0.1)
    assert {name: len(pairs) for name, pairs in data.samples.items()} == {"train": 42, "validation": 12, "test": 6}
    assert sorted(pair for pairs in data.samples.values() for pair in pairs) == sorted(ROWS)
    again = ready(files=write(tmp_path / "a.csv"), val_fraction=0.2, test_fraction=0.1).samples
    assert {name: list(pairs) for name, pairs in again.items()} == {n: list(pairs) for n, pairs in data.samples.items()}


def test_tokenizers(tmp_path):
    files = write(tmp_path / "a.csv")
    data = ready(files=files, tokenizer="bpe", bpe_vocab_size=270)
    assert data.vocab_size == 270
    batch = next(iter(data.train_dataloader()))
    ids = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    assert data.decode(ids) == data.samples["train"][int(batch["sample_ids"][0])][0]
    theirs = ready(files=files, tokenizer=save_bert(tmp_path / "bert"))
    assert (theirs.vocab_size, theirs.eos_id) == (50, 3)  # [SEP]
    batch = next(iter(theirs.train_dataloader()))
    assert all(row[row != -100][-1] == 3 for row in batch["targets"])


def test_the_embedded_task():
    source = 'class A:\n    def f(self):\n        """One.\n\n        Two.\n        """\n        return 1\n'
    assert docstrings({"a.py": source.encode()}) == [("def f(self):\n    return 1", "One.")]
    assert docstrings({"a.py": b"def f(): 'One line.'\n"}) == []
    data = ready(tokenizer="bpe", bpe_vocab_size=1000)
    assert len(data.samples["train"]) > 3000
    assert len(data.samples["validation"]) > 100


def test_the_position_is_resumed(tmp_path):
    files = write(tmp_path / "a.csv")
    first = ready(files=files)
    batches = iter(first.train_dataloader())
    for _ in range(3):
        next(batches)
    state = first.state_dict()
    expected = [batch["sample_ids"].tolist() for batch in batches]
    second = ready(files=files)
    second.load_state_dict(state)
    found = [batch["sample_ids"].tolist() for _, batch in zip(expected, second.train_dataloader(), strict=False)]
    assert found == expected
    with pytest.raises(UsageError, match="place in the data is for digest"):
        ready(files=files, max_length=3).load_state_dict(state)


def test_what_is_wrong(tmp_path):
    with pytest.raises(UsageError, match=r"expected a column 'source' in .*; set source_column and target_column"):
        ready(files=write(tmp_path / "a.csv", header=("de", "en")))
    with pytest.raises(UsageError, match=r"got no 'target' in line 62 of .*b\.csv"):
        ready(files=write(tmp_path / "b.csv", [*ROWS, ("w1", "")]))
    with pytest.raises(UsageError, match="expected validation pairs, got none"):
        ready(files=write(tmp_path / "c.csv"), val_fraction=0.001)
    with pytest.raises(UsageError, match="max_target_length must be at least 2, got 1"):
        SequencePairData(max_target_length=1)
