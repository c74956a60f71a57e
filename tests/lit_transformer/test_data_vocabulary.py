"""Labels and tokenizers travel in checkpoints: what is evaluated is read by them, and others are refused by name."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend

from helpers import make_trainer
from hf_models import save_bert
from lit_transformer import ClassificationData, LitClassifier, SequencePairData, TransformerConfig
from lit_transformer.data.encoder import Encoder
from lit_transformer.data.tables import table_data
from lit_transformer.data.tokenizer import BPETokenizer
from lit_transformer.errors import UsageError
from lit_transformer.run.resume import check_same_configuration

ROWS = [(f"w{i % 40} w{(3 * i) % 40}", "odd" if i % 3 == 1 else "even") for i in range(60)]
PAIRS = {"source_column": "text", "target_column": "label"}


def table(path, rows=ROWS, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def bpe(path, vocab_size):
    path.write_text(BPETokenizer.train([text for text, _ in ROWS], vocab_size).to_json(), encoding="utf-8")
    return str(path)


@pytest.fixture
def trained(tmp_path):
    """A short fit: its checkpoint, and nothing else of it left."""
    torch.manual_seed(0)
    files = table(tmp_path / "a.csv")
    data = ClassificationData(files=files, tokenizer="bpe", bpe_vocab_size=262, max_length=16, batch_size=8)
    config = TransformerConfig(vocab_size=262, max_length=16, d_model=16, n_layers=1, n_heads=2)
    task = LitClassifier(config, data.labels, schedule=None)
    trainer = make_trainer(default_root_dir=tmp_path, max_steps=4, limit_val_batches=0)
    trainer.fit(task, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    Path(files).unlink()
    return tmp_path / "a.ckpt", task.eval(), data


@pytest.mark.parametrize("by_trainer", [True, False])
def test_predictions_need_the_checkpoint_alone(trained, tmp_path, by_trainer, monkeypatch):
    checkpoint, task, data = trained
    texts = [text for text, _ in ROWS[:7]]
    new = table(tmp_path / "new.csv", [*((text,) for text in texts), ("w1", "w2")], ("text",))
    settings = {"files": "gone.csv", "max_length": 16, "batch_size": 3, "predict_files": new, "max_bad_records": 1}
    if by_trainer:
        again = ClassificationData(**settings, tokenizer="bpe", bpe_vocab_size=262)
        path = checkpoint
    else:
        again = ClassificationData.load_from_checkpoint(checkpoint, weights_only=True, **settings)
        assert (again.labels, again.vocab_size) == (["even", "odd"], 262)
        path = None
    other = LitClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    trainer = make_trainer(default_root_dir=tmp_path)
    said = []
    monkeypatch.setattr(table_data, "rank_zero_info", said.append)
    batches = trainer.predict(other, datamodule=again, ckpt_path=path, weights_only=True if by_trainer else None)
    assert [i for batch in batches for i in batch["sample_ids"].tolist()] == list(range(7))
    ids, _ = data.encoder(texts)
    expected = [["even", "odd"][int(task(torch.tensor([row])).argmax())] for row in ids]
    assert [label for batch in batches for label in batch["label"]] == expected
    assert again.labels == ["even", "odd"]
    assert said == [f"Data: samples: predict 7; 1 bad record left out: expected 1 field in line 9 of {new}, got 2"]


def test_other_samples_are_evaluated_by_the_classes_of_training(trained, tmp_path):
    checkpoint, *_ = trained
    files = table(tmp_path / "other.csv", [("w1", "odd"), ("w2", "odd")])
    for name, split in (("test_files", "test"), ("val_files", "val")):
        again = ClassificationData.load_from_checkpoint(checkpoint, weights_only=True, files=None, **{name: files})
        batch = next(iter(getattr(again, f"{split}_dataloader")()))
        assert batch["targets"].tolist() == [1, 1]
        assert not again._read.keys() & {"train"}
    worse = table(tmp_path / "worse.csv", [("w1", "odd"), ("w2", "neither")])
    again = ClassificationData.load_from_checkpoint(checkpoint, weights_only=True, test_files=worse)
    with pytest.raises(UsageError, match=r"line 3 of .*worse\.csv has the class 'neither', which training has not"):
        again.test_dataloader()


def test_another_tokenizer_than_the_checkpoint_has_is_refused(trained, tmp_path):
    checkpoint, *_ = trained
    same, other = bpe(tmp_path / "same.json", 262), bpe(tmp_path / "other.json", 263)
    files = table(tmp_path / "a.csv", ROWS[:5])

    def read(tokenizer):
        state = {"tokenizer": tokenizer, "predict_files": files, "weights_only": True}
        return ClassificationData.load_from_checkpoint(checkpoint, **state).predict_dataloader()

    state = torch.load(checkpoint, weights_only=True)["ClassificationData"]
    Path(same).write_text(state["tokenizer"], encoding="utf-8")
    for tokenizer in ("bpe", same, str(tmp_path / "gone.json")):
        assert len(read(tokenizer)) == 1
    for tokenizer in ("bytes", other, save_bert(tmp_path / "bert"), "bert/elsewhere"):
        with pytest.raises(UsageError, match=rf"the tokenizer of the checkpoint, of 262 tokens, is not .*{tokenizer}"):
            read(tokenizer)
    used = ClassificationData(files=table(tmp_path / "b.csv"), tokenizer="bpe", bpe_vocab_size=263)
    used.setup()
    with pytest.raises(UsageError, match="has a tokenizer of 262 tokens, and the samples have been encoded by another"):
        used.load_vocabulary(state)
    with pytest.raises(UsageError, match="place in the data is for"):
        used.load_state_dict(state)


@pytest.mark.parametrize("kind", [ClassificationData, SequencePairData])
def test_a_hugging_face_tokenizer_travels_too(tmp_path, kind):
    folder = save_bert(tmp_path / "bert")
    settings = {"tokenizer": folder, "max_length": 6} | (PAIRS if kind is SequencePairData else {})
    data = kind(files=table(tmp_path / "a.csv"), **settings)
    data.setup()
    state = data.state_dict()
    assert state["tokenizer"] is None
    torch.save(state, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    fitting = kind(files=table(tmp_path / "a.csv"), **settings)
    fitting.setup()
    fitting.load_state_dict(state)
    shutil.rmtree(folder)
    again = kind(predict_files=table(tmp_path / "b.csv", ROWS[:4]), **settings)
    again.load_state_dict(state)
    batch = next(iter(again.predict_dataloader()))
    ids, _ = data.encoder([text for text, _ in ROWS[:4]])
    assert batch["input_ids"].tolist() == ids  # of four tokens each
    assert batch.keys() == {"input_ids", "attention_mask", "sample_ids"}
    assert (again.vocab_size, again.encoder.eos_id, again.encoder.pad_id) == (50, 3, 0)


def test_a_tokenizer_in_a_checkpoint_writes_nowhere_and_runs_nothing(tmp_path, monkeypatch):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "outer" / "inner"))
    folder = Path(save_bert(tmp_path / "bert"))
    files = {path.name: path.read_text("latin-1") for path in folder.glob("tokenizer*.json")}
    config = json.loads(files["tokenizer_config.json"]) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    files |= {"../evil.py": "raise SystemExit", "tokenizer_config.json": json.dumps(config)}
    saved = {"tokenizer": None, "hugging_face_tokenizer": json.dumps(files)}
    assert Encoder("gone/folder", 8, saved=saved)(["w1"])[0] == [[2, 6, 3]]
    assert [path.name for path in tmp_path.rglob("evil*")] == []


def test_states_of_before_vocabularies_were_saved(tmp_path):
    data = ClassificationData(files=table(tmp_path / "a.csv"))
    data.setup()
    state = data.state_dict()
    old = {key: state[key] for key in ("seed", "token_dropout", "digest", "batching", "position", "excluded")}
    again = ClassificationData(files=table(tmp_path / "a.csv"))
    again.load_state_dict(old)
    again.setup()
    with pytest.raises(UsageError, match=r"place in the data is for labels=\['a', 'b'\]"):
        data.load_state_dict(state | {"labels": ["a", "b"]})
    with pytest.raises(UsageError, match=r"is for the classes \['a', 'b'\], and the samples .* \['even', 'odd'\]"):
        data.load_vocabulary(state | {"labels": ["a", "b"]})


def test_lengths_are_those_before_anything_is_cut_off(tmp_path):
    bert = Encoder(save_bert(tmp_path / "bert"), max_length=4)
    ids, lengths = bert(["w1", "w1 w2 w3", "w1 w2"])
    assert (list(map(len, ids)), lengths.tolist()) == ([3, 4, 4], [3, 5, 4])
    ids, lengths = bert.ended(["w1", "w1 w2 w3"], 4)
    assert ([row[-1] for row in ids], lengths.tolist()) == ([3, 3], [3, 5])
    ids, lengths = Encoder("bytes", 3).ended(["ab", "abc"], 3)
    assert (ids, lengths.tolist()) == ([[97, 98, 0], [97, 98, 0]], [3, 4])
    plain = tmp_path / "plain"
    save_bert(plain)
    backend = Backend.from_file(str(plain / "tokenizer.json"))
    backend.post_processor = None  # as of a decoder: nothing is added to a text
    backend.save(str(plain / "tokenizer.json"))
    ids, lengths = Encoder(str(plain), 3).ended(["w1 w2 w3", "w1 w2"], 3)
    assert ([len(row) for row in ids], [row[-1] for row in ids], lengths.tolist()) == ([3, 3], [3, 3], [4, 3])


def test_settings_that_a_checkpoint_did_not_know_yet_are_the_defaults(tmp_path):
    data = ClassificationData(files="a.csv")
    config = TransformerConfig(vocab_size=256, max_length=16, d_model=16, n_layers=1, n_heads=2)
    task = LitClassifier(config, num_labels=2)
    settings = {key: value for key, value in data.hparams.items() if key not in ("too_long", "max_bad_records")}
    checkpoint = {"hyper_parameters": dict(task.hparams), "datamodule_hyper_parameters": settings}
    check_same_configuration(checkpoint, task, data, tmp_path)
    with pytest.raises(UsageError, match=r"data\.too_long was truncate and is refuse"):
        check_same_configuration(checkpoint, task, ClassificationData(files="a.csv", too_long="refuse"), tmp_path)


def test_classes_that_are_set_have_their_numbers(trained, tmp_path):
    files = table(tmp_path / "b.csv")
    data = ClassificationData(files=files, labels=["odd", "even", "prime"], max_length=16)
    data.setup()
    assert data.labels == ["odd", "even", "prime"]
    assert data.class_counts() == {"odd": 16, "even": 32, "prime": 0}
    batch = next(iter(data.val_dataloader()))
    assert batch["targets"].tolist() == [
        data.labels.index(data.samples["validation"].targets[i]) for i in batch["sample_ids"].tolist()
    ]
    assert data.state_dict()["labels"] == data.labels
    with pytest.raises(UsageError, match="has the class 'odd', which labels have not"):
        ClassificationData(files=files, labels=["even", "prime"]).setup()
    with pytest.raises(UsageError, match="labels must be two classes or more, each named once, got even, even"):
        ClassificationData(labels=["even", "even"])
    state = torch.load(trained[0], weights_only=True)["ClassificationData"]
    with pytest.raises(UsageError, match="the checkpoint is for the classes"):
        ClassificationData(labels=["odd", "even"], tokenizer="bpe", max_length=16).load_vocabulary(state)
