"""Lengths by hand, batches of every kind cut and folded, and runs that are resumed, skipped and rolled back."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from helpers import MemoryLogger, TinyLM, Tokens, assert_identical, loader, make_trainer, says, snapshot
from lit_callbacks import ExactResume, LossSpikeRecovery, SequenceLengthCurriculum, ThroughputLogger, VerifiedCheckpoint
from lit_callbacks._sequence_batch import SequenceBatch
from lit_callbacks.testing import Fault, FaultInjector

IDS = torch.arange(20).view(2, 10)  # two sequences of ten tokens
FIRST_FOUR = [[0, 1, 2, 3], [10, 11, 12, 13]]


class Pair(NamedTuple):
    ids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Record:
    ids: torch.Tensor
    labels: torch.Tensor


class Seen(Callback):
    """(step, epoch, shape of the tokens) of each batch that is trained on, and the shapes validated on."""

    def __init__(self):
        self.batches, self.validated = [], set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.global_step, trainer.current_epoch, tuple(batch["tokens"].shape)))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated.add(tuple(batch["tokens"].shape))

    @property
    def lengths(self):
        return [shape[1] for _, _, shape in self.batches]


def fit(tmp_path, curriculum, callbacks=(), resume=None, data=None, module=None, **options):
    torch.manual_seed(0)
    seen = Seen()
    module = TinyLM(dropout=0.1) if module is None else module
    callbacks = [*([] if curriculum is None else [SequenceLengthCurriculum(**curriculum)]), seen, *callbacks]
    trainer = make_trainer(
        **{"default_root_dir": tmp_path, "callbacks": callbacks, "max_epochs": 2, "num_sanity_val_steps": 1, **options}
    )
    data = loader(n_samples=24) if data is None else data
    trainer.fit(module, data, loader(n_samples=8), ckpt_path=resume)  # six batches of four sequences of nine
    return module, trainer, seen


@pytest.mark.parametrize(
    ("settings", "steps", "epochs", "expected"),
    [
        ({"max_length": 256}, [0] * 6, [0, 1, 2, 3, 4, 9], [128, 160, 192, 224, 256, 256]),  # min(128 + 32 epoch, 256)
        ({"grow_every_n_epochs": 3}, [0, 500, 0, 0], [0, 2, 3, 6], [128, 128, 160, 192]),
        ({"start": 64, "growth": 16, "grow_every_n_steps": 100}, [0, 99, 100, 250], [0, 0, 7, 0], [64, 64, 80, 96]),
        ({"start": 100, "growth": 10}, [0] * 5, range(5), [100, 104, 120, 128, 136]),
        ({"start": 100, "growth": 10, "multiple_of": 1}, [0] * 3, range(3), [100, 110, 120]),
        ({"start": 4, "growth": 1, "max_length": 12}, [0] * 5, [0, 3, 4, 11, 20], [4, 4, 8, 8, 12]),
        ({"start": 4, "growth": 1, "max_length": 14, "multiple_of": 4}, [0], [20], [14]),
    ],
)
def test_lengths_by_hand(settings, steps, epochs, expected):
    curriculum = SequenceLengthCurriculum(**settings)
    assert [curriculum.length_at(step, epoch) for step, epoch in zip(steps, epochs, strict=True)] == expected


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        (IDS, lambda cut: (cut, cut)),
        ({"input_ids": IDS, "labels": IDS}, lambda cut: (cut["input_ids"], cut["labels"])),
        (BatchEncoding({"input_ids": IDS, "labels": IDS}), lambda cut: (cut["input_ids"], cut.labels)),
        ((IDS, IDS), tuple),
        ([IDS, IDS], tuple),
        (Pair(IDS, IDS), lambda cut: (cut.ids, cut.labels)),
        (Record(IDS, IDS), lambda cut: (cut.ids, cut.labels)),
        ({"a": (IDS, {"b": [IDS]}), "names": ["x"], "n": 3}, lambda cut: (cut["a"][0], cut["a"][1]["b"][0])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_batches_of_every_kind(batch, parts):
    cut, folded = SequenceBatch(batch).cut(4), SequenceBatch(batch).fold(2)
    assert type(cut) is type(folded) is type(batch)
    for part in parts(cut):
        assert part.tolist() == FIRST_FOUR
        assert part.view(-1).shape == (8,)
    for part in parts(folded):
        assert part.tolist() == IDS.view(4, 5).tolist()
    assert all(part.shape == (2, 10) for part in parts(batch)), "the loader's own batch stays as it is"


def test_what_is_cut_and_what_is_of_whole_samples():
    batch = {
        "pixels": torch.zeros(2, 3, 10, 10),
        "input_ids": IDS,
        "document_ids": IDS // 3,
        "embedded": torch.arange(40.0).view(2, 10, 2),
        "attention_mask": torch.ones(2, 10, 10).tril().bool(),
        "bias_mask": torch.zeros(1, 1, 10, 10),
        "position_ids": torch.arange(10)[None],
        "labels": torch.zeros(2, 10),  # ten classes, any number of them
        "sample_ids": torch.tensor([7, 8]),
    }
    cut, folded = SequenceBatch(batch).cut(4), SequenceBatch(batch).fold(2)
    shapes = {name: tuple(x.shape) for name, x in cut.items()}
    assert shapes == {
        "pixels": (2, 3, 10, 10),
        "input_ids": (2, 4),
        "document_ids": (2, 4),
        "embedded": (2, 4, 2),
        "attention_mask": (2, 4, 4),
        "bias_mask": (2, 1, 4, 4),  # where each sequence begins
        "position_ids": (2, 4),
        "labels": (2, 10),
        "sample_ids": (2,),
    }
    assert torch.equal(cut["attention_mask"][1], torch.ones(4, 4).tril().bool())
    assert torch.equal(folded["attention_mask"], torch.ones(4, 5, 5).tril().bool())
    assert folded["bias_mask"].shape == (1, 1, 5, 5)
    assert folded["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert folded["embedded"].tolist() == batch["embedded"].view(4, 5, 2).tolist()
    assert folded["sample_ids"].tolist() == [7, 7, 8, 8]
    assert folded["pixels"].shape == (4, 3, 10, 10)


def test_keys_say_what_to_cut():
    batch = {"ids": IDS, "classes": torch.zeros(2, 10, dtype=torch.int64), "other": torch.zeros(2, 3, dtype=torch.int)}
    cut = SequenceBatch(batch, ["ids"]).cut(4)
    assert cut["ids"].tolist() == FIRST_FOUR
    assert cut["classes"].shape == (2, 10)
    with pytest.raises(ValueError, match=r"called one of \['tokens'\], got dict\(ids=int64 \(2, 10\), classes="):
        SequenceBatch(batch, ["tokens"])


def test_padding_on_the_left_goes_first():
    mask = torch.tensor([[0] * 7 + [1] * 3, [0] * 3 + [1] * 7, [1] * 8 + [0] * 2, [0] * 10])
    ids = torch.arange(40).view(4, 10)
    cut = SequenceBatch({"input_ids": ids, "attention_mask": mask}).cut(4)
    assert cut["input_ids"].tolist() == [[6, 7, 8, 9], [13, 14, 15, 16], [20, 21, 22, 23], [30, 31, 32, 33]]
    assert cut["attention_mask"].tolist() == [[0, 1, 1, 1], [1] * 4, [1] * 4, [0] * 4]


@pytest.mark.parametrize("kind", [dict, tuple])
def test_a_target_that_counts_is_kept(kind):
    targets = torch.full((4, 10), -100)
    targets[0, 6:], targets[1, 9], targets[2, 3:] = 1, 1, 1  # the last sequence has none
    ids = torch.arange(40).view(4, 10)
    batch = {"input_ids": ids, "labels": targets} if kind is dict else (ids, targets)
    cut = SequenceBatch(batch).cut(4)
    cut_ids, cut_targets = cut.values() if kind is dict else cut
    assert cut_ids.tolist() == [[4, 5, 6, 7], [16, 17, 18, 19], [20, 21, 22, 23], [30, 31, 32, 33]]
    assert cut_targets.tolist() == [[-100, -100, 1, 1], [-100] * 3 + [1], [-100] * 3 + [1], [-100] * 4]


def test_folding_leaves_out_little_and_drops_padding():
    mask = (torch.tensor([[10], [3]]) > IDS % 10).long()  # ten and three tokens, the rest is padding
    batch = {"input_ids": IDS, "attention_mask": mask, "position_ids": IDS % 10, "weights": torch.tensor([1.0, 2.0])}
    folded = SequenceBatch(batch).fold(3)  # ten tokens are three pieces of three, and one is left over
    assert folded["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [10, 11, 12]]
    assert folded["position_ids"].tolist() == [[0, 1, 2]] * 4
    assert folded["weights"].tolist() == [1, 1, 1, 2]
    packed = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2]] * 2)}
    assert SequenceBatch(packed).fold(2)["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]] * 2


def test_the_loss_of_a_folded_batch_is_that_of_its_pieces():
    from lit_transformer.tasks.causal_lm import LitCausalLM
    from tiny_task import TINY

    task = LitCausalLM(TINY).eval()
    ids = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(0))
    targets, weights = ids[:, 1:].clone(), torch.tensor([1.0, 2.0, 0.5])
    targets[0, 1] = -100
    documents = torch.tensor([[0] * 3 + [1] * 5, [0] * 8, [0] * 2 + [1] * 4 + [2] * 2])  # no one of which sees another
    batch = {"input_ids": ids[:, :-1], "targets": targets, "document_ids": documents, "sample_weights": weights}
    logits = task(ids[:, :-1].reshape(6, 4), documents.reshape(6, 4))
    nats = F.cross_entropy(logits.transpose(1, 2), targets.reshape(6, 4), reduction="none")
    counted = (targets.reshape(6, 4) != -100) * torch.tensor([1.0, 1.0, 2.0, 2.0, 0.5, 0.5])[:, None]
    expected = (nats * counted).sum() / counted.sum()
    torch.testing.assert_close(task.training_loss(SequenceBatch(batch).fold(2)), expected)


def test_a_fit_by_epochs_cuts_training_alone(tmp_path):
    logger = MemoryLogger()
    settings = {"start": 3, "growth": 2, "multiple_of": 1, "every_n_steps": 4}
    _, trainer, seen = fit(tmp_path, settings, max_epochs=5, logger=logger)
    assert seen.lengths == [3] * 6 + [5] * 6 + [7] * 6 + [9] * 12
    assert seen.validated == {(4, 9)}
    logged = logger.values("curriculum/sequence_length")
    assert logged == {0: 3, 4: 3, 8: 5, 12: 7, 16: 7, 20: 9, 24: 9, 28: 9}
    assert "batch_to_device" not in vars(trainer.strategy)


def test_a_run_whose_sequences_are_full_from_the_start_is_the_run_without(tmp_path):
    results = [fit(tmp_path, curriculum)[:2] for curriculum in (None, {"start": 9})]
    assert_identical(*(snapshot(*result) for result in results))


def test_accumulation_changes_the_length_between_optimizer_steps(tmp_path):
    settings = {"start": 3, "growth": 1, "grow_every_n_steps": 1, "multiple_of": 1}
    _, _, seen = fit(tmp_path, settings, accumulate_grad_batches=4)  # windows of 4 and 2 batches
    assert seen.lengths == [3] * 4 + [4] * 2 + [5] * 4 + [6] * 2
    assert [step for step, _, _ in seen.batches] == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 2


def test_pieces_keep_the_tokens_of_a_step_and_throughput_counts_them(tmp_path):
    totals = {}
    for keep_tokens in (False, True):
        logger = MemoryLogger()
        settings = {"start": 3, "growth": 2, "multiple_of": 1, "keep_tokens": keep_tokens}
        _, _, seen = fit(tmp_path, settings, [ThroughputLogger(every_n_steps=6)], logger=logger, max_epochs=4)
        totals[keep_tokens] = list(logger.values("throughput/total_tokens").values())
        if keep_tokens:  # lengths 3, 5, 7, 9: nine tokens are 3 pieces of 3, 2 of 4 and one left over, or whole
            shapes = [(12, 3)] * 6 + [(8, 4)] * 12 + [(4, 9)] * 6
            assert [shape for _, _, shape in seen.batches] == shapes
    assert totals[False] == [6 * 4 * tokens for tokens in (3, 8, 15, 24)]
    assert totals[True] == [6 * tokens for tokens in (36, 68, 100, 136)]


@pytest.mark.parametrize("settings", [{}, {"grow_every_n_steps": 4, "keep_tokens": True}])
def test_a_resume_sees_the_same_lengths_and_ends_with_the_same_bits(tmp_path, settings):
    def savers():
        return [ExactResume(), VerifiedCheckpoint(tmp_path / "ck", "{step}", every_n_train_steps=5, save_top_k=-1)]

    settings = {"start": 3, "growth": 3, "multiple_of": 1, **settings}
    options = {"enable_checkpointing": True, "max_epochs": 3}
    *whole, seen = fit(tmp_path, settings, savers(), **options)
    *rest, seen_after = fit(tmp_path, settings, savers(), resume=str(tmp_path / "ck" / "step=10.ckpt"), **options)
    assert seen_after.batches == seen.batches[10:]
    assert len(set(seen.lengths)) == 3
    assert_identical(snapshot(*rest), snapshot(*whole))


def test_steps_that_are_skipped_and_rolled_back_leave_the_plan(tmp_path):
    settings = {"start": 4, "growth": 1, "grow_every_n_steps": 10, "multiple_of": 1}
    recovery = LossSpikeRecovery(snapshot_every_n_steps=5, prove_steps=5)
    faults = FaultInjector([Fault("nan_gradient", step=18), Fault("nan_weight", step=33)])
    data = loader(n_samples=4 * 60)
    *_, seen = fit(tmp_path, settings, [faults, recovery], data=data, max_epochs=1)
    faults.assert_all_fired()
    assert [step for step, _, _ in seen.batches] == list(range(60))
    assert seen.lengths == [4 + step // 10 for step in range(50)] + [9] * 10
    events = (tmp_path / "events.jsonl").read_text()
    assert events.count('"event": "rollback"') == 1
    assert events.count('"event": "skip"') >= 1


def test_a_skipped_step_is_one_that_never_was(tmp_path):
    settings = {"start": 3, "growth": 1, "grow_every_n_epochs": 1, "multiple_of": 1}
    options = {"max_epochs": 3}
    with_nan = fit(tmp_path, settings, [LossSpikeRecovery()], data=loader({9: "nan"}, n_samples=24), **options)
    without = fit(tmp_path, settings, data=loader(n_samples=24, without=[2]), **options)
    assert_identical(snapshot(*with_nan[:2]), snapshot(*without[:2]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"start": 3, "growth": 3, "grow_every_n_steps": 4}, [4, 8]),  # 3, 6 and 9: two times and half as long again
        ({"start": 4, "growth": 2}, [6, 12]),  # 4, 6, 8, from the first batch of an epoch on
        ({"start": 7, "growth": 1}, []),  # too little
    ],
)
def test_a_large_step_in_length_is_announced(tmp_path, settings, expected):
    class Told(Callback):
        steps = ()

        def expect_shift(self):
            self.steps = (*self.steps, trainer_of.global_step)

        def on_train_start(self, trainer, pl_module):
            nonlocal trainer_of
            trainer_of = trainer

    trainer_of, told = None, Told()
    fit(tmp_path, {"multiple_of": 1, "max_length": 9, **settings}, [told], max_epochs=3)
    assert list(told.steps) == expected


def test_a_run_that_ends_before_sequences_are_full_is_told(tmp_path):
    with says(r"run of 12 steps ends with sequences of 5 tokens, and the data has 9: .* set max_length=5"):
        fit(tmp_path, {"start": 3, "growth": 2, "multiple_of": 1})
    with pytest.raises(AssertionError), says("ends with sequences"):
        fit(tmp_path, {"start": 3, "growth": 2, "multiple_of": 1, "max_length": 5})


class Whole(Tokens):
    """Sequences with a class each."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "label": index % 2}


@pytest.mark.parametrize(
    ("samples", "keep_tokens", "message"),
    [
        ([{"x": torch.zeros(9)} for _ in range(4)], False, r"a batch with token ids.*got dict\(x=float32 \(4, 9\)\)"),
        ([(torch.zeros(9), 1) for _ in range(4)], False, r"got list\(float32 \(4, 9\), int64 \(4\,\)\)"),
        (Whole(4), True, r"the batch has label of shape \(4,\), which is a target.* Leave out keep_tokens\.$"),
        (
            [(torch.arange(9), 1) for _ in range(4)],
            True,
            r"\(4,\) without a name, which may be .*make the batch a dict",
        ),
    ],
)
def test_batches_that_cannot_be_cut_are_refused_at_the_first(tmp_path, samples, keep_tokens, message):
    settings = {"start": 9, "keep_tokens": keep_tokens}  # before anything has to be cut
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, settings, data=DataLoader(samples, 4))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_batches_that_the_step_draws_itself_are_refused(tmp_path):
    class Draws(TinyLM):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(ValueError, match="cannot cut batches that training_step draws itself"):
        fit(tmp_path, {"start": 3}, module=Draws())


def test_a_step_on_tuples_gets_what_is_left_after_the_modules_own_hooks(tmp_path):
    class Pairs(TinyLM):
        seen = ()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            (ids,) = batch
            return ids[:, :-1], ids[:, 1:]  # eight tokens, and targets that move on by one

        def training_step(self, batch, batch_idx):
            ids, targets = batch
            self.seen = (*self.seen, tuple(targets.shape))
            assert torch.equal(ids[:, 1:], targets[:, :-1])
            return F.cross_entropy(self.head(self.hidden(self.embedding(ids))).transpose(1, 2), targets)

    sequences = torch.randint(32, (8, 9), generator=torch.Generator().manual_seed(0))
    data = DataLoader(torch.utils.data.TensorDataset(sequences), 4)
    module = Pairs()
    curriculum = {"start": 2, "growth": 2, "multiple_of": 1, "keep_tokens": True}
    trainer = make_trainer(default_root_dir=tmp_path, max_epochs=4, callbacks=[SequenceLengthCurriculum(**curriculum)])
    trainer.fit(module, data)
    assert module.seen == ((16, 2),) * 2 + ((8, 4),) * 4 + ((4, 8),) * 2
