"""Batches of like length: every sample once an epoch, exact from any place, little padding."""

import csv
import sys
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))

from data_worker import STEPS, WAYS, train

from helpers import two_ranks
from lit_transformer import ClassificationData, SequencePairData
from lit_transformer.data.batching.grouped import GroupedStream, padding
from lit_transformer.data.batching.loader import TrainingLoader
from lit_transformer.errors import UsageError

RNG = np.random.default_rng(0)
LENGTHS = np.minimum(RNG.lognormal(np.log(180), 0.9, 5000), 1024).astype(np.int64)[:, None] + 1


def stream(by_tokens=False, lengths=LENGTHS, seed=0):
    made = GroupedStream(seed, by_tokens)
    made.over(lengths)
    return made


def consume(made, size, count, ranks=1):
    """Batches, drawn as a loader does."""
    batches = []
    for ids, places in islice(made.batches(size, ranks), count):
        made.position = int(places[-1]) + 1
        batches.append(ids.tolist())
    return batches


@pytest.mark.parametrize(("by_tokens", "size"), [(False, 32), (False, 7), (True, 8192)])
def test_every_epoch_has_every_sample_once(by_tokens, size):
    made = stream(by_tokens)
    count = made.batches_per_epoch(size)
    first = consume(made, size, count)
    assert made.position == len(LENGTHS)
    assert sorted(chain(*first)) == list(range(len(LENGTHS)))
    second = consume(made, size, count + 20)  # by tokens, an epoch may have some batches more
    assert sorted(islice(chain(*second), len(LENGTHS))) == list(range(len(LENGTHS)))
    assert first != second[:count]


def test_batches_are_full_and_as_long_as_they_may_be():
    sizes = [len(batch) for batch in consume(stream(), 32, 157)]
    assert set(sizes[:150]) == {32}  # the last mega-batch is cut evenly
    assert min(sizes[150:]) == 28  # 200 in seven
    pairs = np.concatenate([LENGTHS, LENGTHS[::-1]], axis=1)
    made = stream(by_tokens=True, lengths=pairs)
    padded = [len(batch) * pairs[batch].max(0).sum() for batch in consume(made, 4096, 200)]
    assert max(padded) <= 4096
    assert np.mean(padded) > 0.8 * 4096


@pytest.mark.parametrize(
    ("median", "sigma", "cap"),
    [(180, 0.9, 1024), (22, 0.6, 128), (None, None, 1024)],
    ids=["texts", "sentences", "chat"],
)
def test_padding_is_below_seven_percent(median, sigma, cap):
    lengths = RNG.lognormal(np.log(median or 60), sigma or 0.5, 20_000)
    if median is None:  # short questions and long answers
        lengths[::2] = RNG.lognormal(np.log(600), 0.5, 10_000)
    lengths = np.clip(lengths, 1, cap).astype(np.int64)[:, None]
    for by_tokens, size in ((False, 32), (True, 32 * 256)):
        made = stream(by_tokens, lengths)
        batches = (ids for ids, _ in islice(made.batches(size), made.batches_per_epoch(size)))
        assert padding(lengths, batches) <= 0.07
    other = np.clip(lengths[:, 0] * RNG.lognormal(0, 0.25, len(lengths)), 1, cap).astype(np.int64)  # of translations
    pairs = np.stack([lengths[:, 0], other], axis=1)
    made = stream(lengths=pairs)
    batches = (ids for ids, _ in islice(made.batches(32), made.batches_per_epoch(32)))
    assert padding(pairs, batches) < 0.16
    shuffled = np.array_split(RNG.permutation(len(lengths)), len(lengths) // 32)
    assert padding(lengths, iter(shuffled)) > 0.5


@pytest.mark.parametrize("by_tokens", [False, True])
def test_it_goes_on_from_any_place(by_tokens):
    size = 4096 if by_tokens else 16
    whole = consume(stream(by_tokens), size, 400)
    for done in (1, 57, 250, 399):
        made = stream(by_tokens)
        consume(made, size, done)
        again = stream(by_tokens)
        again.load_state_dict(made.state_dict())
        assert consume(again, size, 400 - done) == whole[done:]


def test_skipping_and_excluding():
    whole = consume(stream(), 16, 40)
    made = stream()
    made.skip(16 * 3 + 5)  # into the fourth batch
    assert consume(made, 16, 5) == [whole[3][5:], *whole[4:8]]
    made = stream()
    made.exclude([whole[2][0], *whole[4]])
    assert consume(made, 16, 8) == [*whole[:2], whole[2][1:], whole[3], *whole[5:9]]
    with pytest.raises(UsageError, match="no batch of 5 samples has one for each of 6 processes"):
        next(stream(lengths=LENGTHS[:5]).batches(16, ranks=6))


ROWS = [("w1 " * (i % 30 + 1), "ab"[i % 2]) for i in range(200)]
SETTINGS = {
    ClassificationData: {},
    SequencePairData: {"source_column": "text", "target_column": "label"},
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *ROWS])
    return str(tmp_path / "a.csv")


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("how", [{"group_by_length": True, "batch_size": 8}, {"max_tokens": 400}])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [3, "last", "end"])
def test_modules_resume(kind, how, workers, done, files):
    def ready():
        data = kind(files=files, num_workers=workers, **how, **SETTINGS[kind])
        data.setup()
        return data

    def ids(data, count):
        found = []
        while len(found) < count:
            found += [batch["sample_ids"].tolist() for batch in islice(data.train_dataloader(), count - len(found))]
        return found

    count = ready().batches_per_epoch()
    whole = ids(ready(), count + 6)
    made = {"last": count - 1, "end": count}.get(done, done)
    first = ready()
    assert ids(first, made) == whole[:made]
    first.exclude(whole[0])
    second = ready()
    second.load_state_dict(first.state_dict())
    expected = [[i for i in batch if i not in whole[0]] for batch in whole[made:]]
    assert ids(second, len(expected) - 1) == [batch for batch in expected if batch][: len(expected) - 1]
    assert "% of the tokens in training batches are padding" in second.describe()


def test_ranks_share_each_batch(files):
    data = ClassificationData(files=files, group_by_length=True, batch_size=8)
    data.setup()

    def of(rank, world):
        made = GroupedStream(0)
        made.over(data._splits["train"].lengths())
        loader = TrainingLoader(data._splits["train"], made, 8 // world, rank, world)
        return [batch["sample_ids"].tolist() for batch in loader]

    alone, ranks = of(0, 1), [of(0, 2), of(1, 2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in alone]
    assert all(abs(len(a) - len(b)) < 2 for a, b in zip(*ranks, strict=True))


def test_what_is_wrong(files):
    with pytest.raises(UsageError, match="max_tokens to be at least the longest sample's 90 tokens, got 80"):
        ClassificationData(files=files, max_tokens=80).setup()
    with pytest.raises(UsageError, match="max_tokens must be at least 1, got 0"):
        ClassificationData(max_tokens=0)
    first, other = (ClassificationData(files=files, group_by_length=True, batch_size=size) for size in (8, 4))
    plain = ClassificationData(files=files)
    for data in (first, other, plain):
        data.setup()
    with pytest.raises(UsageError, match="batching=8 samples of like length, this data module has batching=4 samples"):
        other.load_state_dict(first.state_dict())
    with pytest.raises(UsageError, match="batching=random, this data module has batching=4 samples"):
        other.load_state_dict(plain.state_dict())


def test_two_ranks_train_on_what_one_does_and_resume(files, tmp_path):
    for i in range(80):
        (tmp_path / f"{i}.txt").write_text("some words " * (i % 9 + 1))
    ranks = two_ranks(Path(__file__).with_name("data_worker.py"), tmp_path, "data", files)
    for way in WAYS:
        alone, epoch = train(files, tmp_path / f"{way}_alone", way, STEPS)
        assert epoch < STEPS - 4
        together = [a + b for a, b in zip(*(rank[way]["whole"] for rank in ranks), strict=True)]
        assert together == alone
        for rank in ranks:
            for place, seen in rank[way]["resumed"].values():
                assert seen == rank[way]["whole"][place : place + 4]
                assert all(seen)
