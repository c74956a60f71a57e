"""Augmented texts: a function of seed and draw, on any number of workers and ranks, and the same when resumed."""

import copy
import csv
import pickle
import sys
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
import yaml

from helpers import make_trainer
from hf_models import save_bert
from lit_transformer import (
    BackTranslation,
    ClassificationData,
    LitClassifier,
    LitSeq2Seq,
    SentenceShuffle,
    SequencePairData,
    TransformerConfig,
)
from lit_transformer.cli import main
from lit_transformer.data.augmentation.augmenter import checked
from lit_transformer.data.batching.loader import TrainingLoader
from lit_transformer.data.batching.order import SampleStream
from lit_transformer.errors import UsageError

KINDS = [ClassificationData, SequencePairData]
TEXTS = [f"One {i}. Two{' and' * (i % 4)}! Three?" for i in range(60)]
COLUMNS = {
    ClassificationData: {},
    SequencePairData: {"source_column": "text", "target_column": "label"},
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *((text, "ab"[i % 2]) for i, text in enumerate(TEXTS))])
    return str(tmp_path / "a.csv")


def ready(kind, files, augmentations, **options):
    data = kind(files=files, augmentations=augmentations, **{"batch_size": 8, **COLUMNS[kind], **options})
    data.setup()
    return data


def numbered(text, generator):
    """A text with a random number in front, or as it was."""
    number = generator.integers(1000)
    return f"{number} {text}" if number < 800 else text


def read(batches):
    """Each text as it is trained on, with its sample's id and class or target, in order."""
    return [
        (int(i), row[mask.bool()].tolist(), target.tolist())
        for batch in batches
        for i, row, mask, target in zip(
            batch["sample_ids"], batch["input_ids"], batch["attention_mask"], batch["targets"], strict=True
        )
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_texts_are_those_that_the_draw_says(kind, workers, files):
    plain = ready(kind, files, None, seed=3)
    data = ready(kind, files, [numbered], seed=3, num_workers=workers, max_length=20)
    texts = {i: bytes(ids).decode() for i, ids, _ in read(plain.train_dataloader())}
    known = {i: target for i, _, target in read(plain.train_dataloader())}
    drawn = read(batch for _ in range(3) for batch in data.train_dataloader())
    assert len(drawn) == 3 * 48
    for draw, (i, ids, target) in enumerate(drawn):
        wanted = numbered(texts[i], np.random.default_rng([3, draw])) if i in texts else None
        assert wanted is None or ids == list(wanted.encode()[:20])
        assert i not in known or target == known[i]
    assert len({tuple(ids) for _, ids, _ in drawn}) > 110
    assert {i for i, ids, _ in drawn if bytes(ids)[:3] == b"One"} != set()
    validation = [plain.val_dataloader(), data.val_dataloader()]
    assert [ids[:20] for _, ids, _ in read(validation[0])] == [ids for _, ids, _ in read(validation[1])]


def test_padding_is_that_of_the_new_texts_and_a_batch_without_change_is_left_alone(files):
    data = ready(ClassificationData, files, [lambda text, generator: text * int(generator.integers(1, 3))])
    samples = data._splits["train"]
    batch = samples.__getitems__(np.arange(8))
    found = samples.augment(batch, np.arange(8))
    lengths = found["attention_mask"].sum(1)
    assert found["input_ids"].shape[1] == lengths.max() > batch["input_ids"].shape[1]
    assert ((found["input_ids"] != 0) == found["attention_mask"].bool()).all()
    assert set((lengths // batch["attention_mask"].sum(1)).tolist()) == {1, 2}
    samples.augmenter.augmentations = [lambda text, generator: text]
    assert samples.augment(batch, np.arange(8)) is batch


def test_one_after_the_other_on_the_same_numbers_then_tokens_are_taken_out(files):
    def second(text, generator):
        return f"{text} {generator.integers(1000)}"

    data = ready(ClassificationData, files, [numbered, second], max_length=99)
    generator = np.random.default_rng([0, 0])
    i, ids, _ = read(islice(data.train_dataloader(), 1))[0]
    wanted = second(numbered(data.samples["train"][i][0], generator), generator)
    assert bytes(ids).decode() == wanted
    dropped = ready(ClassificationData, files, [numbered, second], max_length=99, token_dropout=0.3)
    fewer = read(islice(dropped.train_dataloader(), 1))[0][1]
    assert len(fewer) < len(ids)
    assert (fewer[0], fewer[-1]) == (ids[0], ids[-1])


def test_special_tokens_of_a_hugging_face_tokenizer_are_around_the_new_text(files, tmp_path):
    data = ready(ClassificationData, files, [lambda text, generator: "w7 w8"], tokenizer=save_bert(tmp_path / "bert"))
    assert {tuple(ids) for _, ids, _ in read(data.train_dataloader())} == {(2, 12, 13, 3)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("way", [{}, {"group_by_length": True}, {"max_tokens": 300, "max_length": 64}])
def test_a_resume_goes_on_with_the_same_texts(files, workers, way):
    def make(augmentations=None, **options):
        data = [numbered, SentenceShuffle(0.5)] if augmentations is None else augmentations
        return ready(SequencePairData, files, data, num_workers=workers, **way, **options)

    whole = make().train_dataloader()
    expected = read(batch for _ in range(2) for batch in whole)
    part = make()
    seen = read(islice(part.train_dataloader(), 3))
    again = make()
    again.load_state_dict(part.state_dict())
    rest = again.train_dataloader()
    assert (seen + read(batch for _ in range(2) for batch in rest))[: len(expected)] == expected
    message = r"place in the data is for augmentations=.*numbered, Sentence.*, this data module has augmentations="
    for others in ([], [numbered], [numbered, SentenceShuffle(0.6)], [SentenceShuffle(0.5), numbered]):
        with pytest.raises(UsageError, match=message):
            make(others).load_state_dict(part.state_dict())


def test_two_ranks_train_on_what_one_process_does(files):
    data = ready(ClassificationData, files, [numbered])
    samples = data._splits["train"]

    def texts(size, rank, ranks):
        return list(islice(TrainingLoader(samples, SampleStream(0, len(samples)), size, rank, ranks), 4))

    one, ranks = texts(8, 0, 1), [texts(4, rank, 2) for rank in range(2)]
    assert read(one) == [text for pair in zip(*ranks, strict=True) for text in read(pair)]


def make_task(kind):
    config = TransformerConfig(d_model=16, n_layers=1, n_heads=2, max_length=64, residual_dropout=0.1)
    torch.manual_seed(0)
    if kind is ClassificationData:
        return LitClassifier(config, num_labels=2, schedule=None)
    return LitSeq2Seq(config, scored_samples=0, schedule=None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_that_is_resumed_ends_as_the_one_that_was_not(kind, files, tmp_path):
    from lit_callbacks import ExactResume

    asked = []

    def to(texts):
        asked.extend(texts)
        return [text.replace("One", "Eins") for text in texts]

    def fit(steps, **options):
        augmentations = [BackTranslation(to, lambda texts: texts), SentenceShuffle()]
        data = kind(files=files, augmentations=augmentations, max_length=64, batch_size=8, **COLUMNS[kind])
        task = make_task(kind)
        trainer = make_trainer(max_steps=steps, max_epochs=-1, limit_val_batches=1, callbacks=[ExactResume()])
        trainer.fit(task, data, **options)
        return task, trainer

    whole, trainer = fit(10)
    assert sorted(asked) == sorted(text for i, text in enumerate(TEXTS) if asked.count(text))
    assert set(TEXTS).issuperset(asked)
    assert float(trainer.callback_metrics["train/loss"]) > 0
    _, part = fit(4)
    part.save_checkpoint(tmp_path / "a.ckpt")
    resumed, _ = fit(10, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]["augmentations"]
    assert saved[0].startswith("lit_transformer.data.augmentation.back_translation.BackTranslation(to=")
    assert saved[1]["init_args"] == {"probability": 0.5}


def test_nothing_is_prepared_where_nothing_is_trained(files):
    def refuse(texts):
        raise AssertionError

    data = ClassificationData(files=files, augmentations=[BackTranslation(refuse, refuse)], max_length=64)
    make_trainer(limit_val_batches=1).validate(make_task(ClassificationData), data, verbose=False)
    with pytest.raises(UsageError, match=r"the translator .*refuse failed on 'One .*AssertionError"):
        data.setup("fit")


def test_a_data_module_comes_back_from_a_checkpoint(files, tmp_path):
    def save(augmentations):
        data = ClassificationData(files=files, augmentations=augmentations, batch_size=8, max_length=64)
        trainer = make_trainer(max_steps=1, max_epochs=-1, limit_val_batches=0)
        trainer.fit(make_task(ClassificationData), data)
        trainer.save_checkpoint(tmp_path / "a.ckpt")

    load = partial(ClassificationData.load_from_checkpoint, tmp_path / "a.ckpt", weights_only=True)
    save([SentenceShuffle(0.3)])
    assert load()._augmentations == [SentenceShuffle(0.3)]
    save([numbered])
    with pytest.raises(UsageError, match=r"the augmentation .*numbered is only known by name"):
        load()
    assert load(augmentations=[numbered])._augmentations == [numbered]
    save(None)
    assert load()._augmentations == []


def test_a_checkpoint_cannot_name_just_anything(tmp_path):
    marker = tmp_path / "executed"
    for path, arguments in (("subprocess.Popen", {"args": ["touch", str(marker)]}), ("os.system", {"command": "true"})):
        with pytest.raises(UsageError, match=f"expected a class with __call__.* for an augmentation, got {path}"):
            checked([{"class_path": path, "init_args": arguments}])
    with pytest.raises(UsageError, match=r"the augmentation 'no\.such\.Thing' cannot be found"):
        checked([{"class_path": "no.such.Thing"}])
    assert not marker.exists()


def test_loader_workers_get_none_of_it(files):
    data = ready(ClassificationData, files, [lambda text, generator: text + "!"])
    samples = data._splits["train"]
    there = pickle.loads(pickle.dumps(samples))
    batch = there.__getitems__(np.arange(4))
    with pytest.raises(UsageError, match="augmentations stay in the process that has set up the data"):
        there.augment(batch, np.arange(4))
    assert bytes(read([copy.deepcopy(samples).augment(batch, np.arange(4))])[0][1]).endswith(b"?!")


class Broken:
    """Fails, or returns what it is given."""

    def __init__(self, found):
        self.found = found

    def __call__(self, text, generator):
        return text[10_000] if self.found is IndexError else self.found


@pytest.mark.parametrize("found", [None, 3, b"text", "", IndexError])
def test_what_fails_is_named_with_the_sample(files, found):
    data = ready(ClassificationData, files, [SentenceShuffle(), Broken(found)])
    first = int(data._stream.batches(1).__next__()[0][0])
    message = (
        rf"the augmentation .*Broken failed on training sample {first}: IndexError: string index"
        if found is IndexError
        else rf"expected the augmentation .*Broken to return a text, got {found!r} for training sample {first};"
    )
    with pytest.raises(UsageError, match=message):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize("given", [SentenceShuffle, 3, "lit_transformer.SentenceShuffle"])
def test_what_cannot_be_called(given):
    with pytest.raises(UsageError, match=r"expected augmentations to be called with a text|is only known by name"):
        SequencePairData(augmentations=[given])


MINE = """
import numpy as np


def shout(text: str, generator: np.random.Generator) -> str:
    return text.upper() if generator.random() < 0.5 else text


class Mark:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __call__(self, texts: list[str]) -> list[str]:
        return [text + self.mark for text in texts]


class Repeat:
    def __init__(self, times: int = 2) -> None:
        self.times = times

    def __call__(self, text: str, generator: np.random.Generator) -> str:
        return self.times * text
"""


def test_from_the_command_line(files, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LIT_TRANSFORMER_RUN", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    marks = {way: {"class_path": "mine.Mark", "init_args": {"mark": way}} for way in ("to", "back")}
    rest = {"probability": 0.5, "batch_size": 32, "file": None}
    augmentations = [
        {"class_path": "lit_transformer.BackTranslation", "init_args": marks | rest},
        {"class_path": "lit_transformer.SentenceShuffle", "init_args": {"probability": 0.3}},
        {"class_path": "mine.Repeat", "init_args": {"times": 3}},
        "mine.shout",
    ]
    settings = {"files": files, "batch_size": 4, "max_length": 32, "tokenizer": "bytes", "augmentations": augmentations}
    config = {"data": {"class_path": "lit_transformer.ClassificationData", "init_args": settings}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", "classification", "--config", str(tmp_path / "mine.yaml"), "--trainer.limit_val_batches=1"]
    words += [f"--trainer.default_root_dir={tmp_path}", "--run=a"]
    words += ["--model.init_args.config.d_model=16", "--model.init_args.config.n_layers=1"]
    words += ["--model.init_args.schedule.init_args.warmup=1"]

    def said(*more):
        with pytest.raises(SystemExit) as stop:
            main(["fit", *words, *more])
        return stop.value.code

    assert said("--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]["augmentations"]
    assert printed == augmentations
    main(["fit", *words, "--trainer.max_steps=2"])
    main(["fit", *words, "--trainer.max_steps=3", "--ckpt_path=last"])
    assert (tmp_path / "a" / "checkpoints" / "step=3.ckpt").exists()
    kept = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["data"]["init_args"]["augmentations"]
    assert kept == augmentations
    capsys.readouterr()
    assert said("--trainer.max_steps=4", "--ckpt_path=last", "--data.init_args.augmentations=null") == 2
    assert "data.augmentations was [" in capsys.readouterr().err
    evil = "[{class_path: subprocess.Popen, init_args: {args: [touch, executed]}}]"
    assert said(f"--data.init_args.augmentations={evil}") == 2
    assert "subprocess.Popen" in capsys.readouterr().err
    assert said("--data.init_args.augmentations=[lit_transformer.LitClassifier]") == 2
    assert "LitClassifier does not implement protocol Augmentation" in capsys.readouterr().err
