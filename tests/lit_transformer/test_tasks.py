"""Each task in a short real fit: it learns, its metrics are right, it is loaded back, resumed, taught, started from."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.text import CHRFScore, SacreBLEUScore

from lit_callbacks import ExactResume, VerifiedCheckpoint, recommended
from lit_transformer import (
    Distillation,
    LitCausalLM,
    LitClassifier,
    LitMaskedLM,
    LitSeq2Seq,
    TransformerConfig,
)
from lit_transformer.errors import UsageError
from lit_transformer.nn.classifier import pool
from lit_transformer.run.predictions import PredictionsFile
from tiny_task import trainer

TINY = TransformerConfig(
    vocab_size=12, max_length=10, d_model=32, n_layers=2, n_heads=4,
    attention_dropout=0, ffn_dropout=0, residual_dropout=0, embedding_dropout=0,
)  # fmt: skip
ADAM = partial(torch.optim.AdamW, lr=5e-3)


def collate(rows):
    """Padded on the right, targets with -100."""
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].ndim and key != "labels":
            batch[key] = torch.nn.utils.rnn.pad_sequence(values, True, -100 if key == "targets" else 0)
        else:
            batch[key if key != "labels" else "targets"] = torch.stack(values)
    return batch


class Data(LightningDataModule):
    """Sequences of 4 to 8 tokens from 1 to 11, and what a task makes of each."""

    def __init__(self, make, n=64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for _ in range(n):
            ids = torch.randint(1, 12, (int(torch.randint(4, 9, (), generator=generator)),), generator=generator)
            self.rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)} | make(ids))

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=16, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(self.rows[:24], batch_size=8, collate_fn=collate)

    test_dataloader = predict_dataloader = val_dataloader

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


def masked(ids):
    """Each third token is hidden as 0; all of a sequence are its first."""
    return {"input_ids": torch.where(torch.arange(len(ids)) % 3 == 1, 0, ids[0]),
            "targets": torch.where(torch.arange(len(ids)) % 3 == 1, ids[0], -100)}  # fmt: skip


def classes(ids):
    return {"labels": (ids[-1] > 6).long()}


def first(ids):
    """A source is one token, several times; its target is that token four times."""
    return {"input_ids": ids[0].expand_as(ids).clone(), "targets": torch.tensor([*[int(ids[0])] * 4, 0])}


def task(kind, config=TINY, **settings):
    torch.manual_seed(0)
    settings = {"optimizer": ADAM, "schedule": None} | settings
    return {
        "masked_lm": lambda: LitMaskedLM(config, **settings),
        "classification": lambda: LitClassifier(config, num_labels=2, **{"pooling": "last"} | settings),
        "causal": lambda: LitClassifier(config, num_labels=2, causal=True, **{"pooling": "last"} | settings),
        "seq2seq": lambda: LitSeq2Seq(config, **{"max_new_tokens": 5, "scored_samples": 20} | settings),
    }[kind]()


DATA = {"masked_lm": masked, "classification": classes, "causal": classes, "seq2seq": first}


@pytest.mark.parametrize("kind", DATA)
def test_it_learns_and_is_loaded_back(kind, tmp_path):
    module, data = task(kind), Data(DATA[kind])
    run = trainer(tmp_path, max_epochs=20, check_val_every_n_epoch=20, callbacks=recommended())
    run.fit(module, data)
    (metrics,) = run.validate(module, data, verbose=False)
    assert metrics["val/accuracy"] > 0.9
    if kind == "seq2seq":
        assert metrics["val/bleu"] > 0.6
        assert metrics["val/chrf"] > 0.6
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = type(module).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.hparams == module.hparams
    (again,) = trainer(tmp_path).validate(loaded, data, verbose=False)
    assert {name: again[name] for name in again} == {name: metrics[name] for name in again}


@pytest.mark.parametrize("kind", DATA)
def test_a_resumed_run_is_the_same(kind, tmp_path):
    def fit(resume=None):
        module = task(kind, replace(TINY, residual_dropout=0.1, attention_dropout=0.1))
        saving = VerifiedCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        run = trainer(
            tmp_path, max_steps=8, max_epochs=-1, callbacks=[ExactResume(), saving], enable_checkpointing=True
        )
        run.fit(module, Data(DATA[kind]), ckpt_path=resume, weights_only=False)
        return module.state_dict()

    whole = fit()
    rest = fit(tmp_path / "step=6.ckpt")
    assert all(torch.equal(value, rest[name]) for name, value in whole.items())


def test_metrics_are_those_of_all_samples_at_once(tmp_path):
    data = Data(first)
    module = task("seq2seq", scored_samples=100).eval()
    (metrics,) = trainer(tmp_path).validate(module, data, verbose=False)
    batch = collate(data.rows[:24])
    shown = F.pad(batch["targets"][:, :-1], (1, 0), value=0).clamp(min=0)
    with torch.no_grad():
        logits = module.model(batch["input_ids"], shown, batch["attention_mask"].bool())
    nats = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
    assert metrics["val/loss"] == pytest.approx(float(nats), rel=1e-5)
    written = [data.decode(ids) for ids in module.eval().write(batch["input_ids"], batch["attention_mask"])]
    wanted = [[data.decode(row[row > 0].tolist())] for row in batch["targets"]]
    assert metrics["val/bleu"] == pytest.approx(float(SacreBLEUScore()(written, wanted)))
    assert metrics["val/chrf"] == pytest.approx(float(CHRFScore()(written, wanted)), rel=1e-5)


def test_only_so_many_samples_are_written(tmp_path, monkeypatch):
    module, counts = task("seq2seq", scored_samples=10), []
    write = module.write
    monkeypatch.setattr(module, "write", lambda ids, mask=None: counts.append(len(ids)) or write(ids, mask))
    trainer(tmp_path).validate(module, Data(first), verbose=False)
    assert counts == [8, 2]
    counts.clear()
    trainer(tmp_path).validate(task("seq2seq", scored_samples=0), Data(first), verbose=False)
    assert counts == []


def test_predictions_of_a_text_are_a_file(tmp_path):
    path = tmp_path / "predictions.csv"
    run = trainer(tmp_path, callbacks=[PredictionsFile(path)])
    run.predict(task("seq2seq", replace(TINY, tie_embeddings=False)), Data(first), return_predictions=False)
    lines = path.read_text().splitlines()
    assert lines[0] == "loss,text"
    assert len(lines) == 25
    assert "w" in "".join(lines[1:])


def test_several_labels_a_sample(tmp_path):
    module = LitClassifier(TINY, num_labels=3, multi_label=True, optimizer=ADAM, schedule=None)
    data = Data(lambda ids: {"labels": torch.stack([(ids > k).any() for k in (5, 9, 10)]).float()})
    run = trainer(tmp_path, max_epochs=20, check_val_every_n_epoch=20)
    run.fit(module, data)
    (metrics,) = run.validate(module, data, verbose=False)
    batch = collate(data.rows[:24])
    with torch.no_grad():
        guessed = module.eval().logits(batch) > 0
    assert metrics["val/accuracy"] == pytest.approx(float((guessed == batch["targets"].bool()).float().mean()))
    assert metrics["val/accuracy"] > 0.9


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_pooling_sees_no_padding(how):
    states = torch.randn(3, 6, 4)
    real = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [0] * 6])
    pooled = pool(states, real, how)
    by_hand = {"mean": states[1, :2].mean(0), "cls": states[1, 0], "last": states[1, 1]}
    torch.testing.assert_close(pooled[1], by_hand[how])
    torch.testing.assert_close(pooled[:1], pool(states[:1], None, how))
    assert pooled.isfinite().all()


def test_a_causal_classifier_starts_from_a_language_model(tmp_path):
    torch.manual_seed(1)
    start = LitCausalLM(TINY, ADAM)
    trainer(tmp_path, max_steps=1, max_epochs=-1).fit(start, DataLoader(
        [{"input_ids": torch.ones(5).long(), "targets": torch.ones(5).long()}] * 4, 2))  # fmt: skip
    start.trainer.save_checkpoint(tmp_path / "lm.ckpt")
    module = task("causal", init_from=str(tmp_path / "lm.ckpt"), optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer(tmp_path, max_steps=1).fit(module, Data(classes))
    ours, theirs = module.state_dict(), start.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "blocks" in name or "embedding" in name)


def test_a_classifier_starts_from_a_masked_language_model(tmp_path):
    start = task("masked_lm")
    run = trainer(tmp_path, max_steps=2)
    run.fit(start, Data(masked))
    run.save_checkpoint(tmp_path / "mlm.ckpt")
    module = task("classification", init_from=str(tmp_path / "mlm.ckpt"), optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer(tmp_path, max_steps=1).fit(module, Data(classes))
    theirs = start.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in module.state_dict().items() if ".encoder." in name)


@pytest.mark.parametrize("kind", DATA)
def test_a_student_learns_from_a_teacher_of_its_kind(kind, tmp_path):
    teacher, data = task(kind), Data(DATA[kind])
    run = trainer(tmp_path, max_steps=2)
    run.fit(teacher, data)
    run.save_checkpoint(tmp_path / "teacher.ckpt")
    student = task(kind, distillation=Distillation(str(tmp_path / "teacher.ckpt")))
    student.load_state_dict(teacher.state_dict())
    run = trainer(tmp_path, max_steps=1)
    run.fit(student, data)
    assert float(run.callback_metrics["train/distillation"]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", DATA)
def test_sample_weights_leave_samples_out(kind):
    module, batch = task(kind), collate(Data(DATA[kind]).rows[:4])
    weighted = module.training_loss(batch | {"sample_weights": torch.tensor([1.0, 0.0, 1.0, 0.0])})
    torch.testing.assert_close(weighted, module.training_loss({key: value[::2] for key, value in batch.items()}))


@pytest.mark.parametrize("kind", DATA)
def test_compiled_from_the_settings(kind, tmp_path):
    torch._dynamo.reset()
    module = task(kind, compile_model=True)
    module.model.compile = partial(module.model.compile, backend="aot_eager")
    rows = [row for row in Data(DATA[kind]).rows if len(row["input_ids"]) == 6]
    expected = task(kind).training_loss(collate(rows[:2])).item()
    run = trainer(tmp_path, max_steps=1, max_epochs=-1)
    run.fit(module, DataLoader(rows[:2], 2, collate_fn=collate))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LitClassifier(TINY), "give labels, the names of the classes, or num_labels"),
        (lambda: LitClassifier(TINY, ["a", "b"], num_labels=3), "2 names, num_labels=3"),
        (lambda: LitClassifier(TINY, num_labels=2, pooling="max"), "pooling must be one of mean, cls, last, got 'max'"),
        (lambda: LitClassifier(TINY, num_labels=2, pooling="cls", causal=True), "one of mean, last, got 'cls'"),
        (lambda: LitSeq2Seq(TINY, beams=0), "beams must be at least 1, got 0"),
        (lambda: LitSeq2Seq(TINY, scored_samples=-1), "scored_samples must be at least 0, got -1"),
        (lambda: LitSeq2Seq(TINY, max_new_tokens=11), "max_new_tokens must be from 1 to max_length=10, got 11"),
    ],
)
def test_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_data_that_does_not_fit_is_refused(tmp_path):
    data = Data(first)
    data.max_target_length = 11
    with pytest.raises(UsageError, match=r"targets of 11 tokens, but the model takes 10 at most.*max_target_length"):
        trainer(tmp_path, max_steps=1).fit(task("seq2seq"), data)
    data = Data(first)
    data.vocab_size = 13
    with pytest.raises(UsageError, match=r"the data has 13 token ids, but the model takes 12"):
        trainer(tmp_path, max_steps=1).fit(task("seq2seq"), data)
    data = Data(first)
    data.rows[5]["input_ids"][2] = 40
    with pytest.raises(IndexError, match="token id 40 at row 5, position 2 is not in the vocabulary of 12"):
        trainer(tmp_path, max_steps=1).fit(task("seq2seq"), data)
