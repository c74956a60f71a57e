import pickle
from itertools import chain
from multiprocessing import active_children
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint

from lit_transformer.data import LanguageModelingData
from lit_transformer.errors import UsageError

BLOCK = 8
TEXT = "".join(f"{i:03d}, " for i in range(51))  # 255 bytes: 25 training blocks, 3 of validation and test
SETTINGS = {"val_fraction": 0.1, "test_fraction": 0.1, "block_size": BLOCK, "batch_size": 4}
PARTIAL = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
WORKERS = [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]


@pytest.fixture
def make(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)

    def build(**changes):
        settings = {"files": str(tmp_path / "text.txt"), "cache_dir": str(tmp_path / "cache")} | SETTINGS | changes
        return LanguageModelingData(**settings)

    return build


@pytest.fixture
def data(make):
    data = make()
    data.setup()
    return data


class Recorder(LightningModule):
    """A model that remembers which samples it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
        self.evaluated = []

    def training_step(self, batch):
        self.seen.append(self.trainer.datamodule.sample_ids(batch))
        return self.weight.sum()

    def validation_step(self, batch):
        self.evaluated.append(batch["sample_ids"].tolist())
        return self.weight.sum()

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, callbacks=(), **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_epochs": 3, "enable_checkpointing": bool(callbacks)} | settings
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **quiet, **settings)


def fit(data, tmp_path, callbacks=(), ckpt_path=None, **settings):
    model = Recorder()
    trainer(tmp_path, callbacks, **settings).fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model.seen


def flat(lists):
    return list(chain.from_iterable(lists))


def take(data, batches):
    """Consume batches of the training loader; returns their sample ids."""
    seen = []
    while len(seen) < batches:
        for batch in data.train_dataloader():
            seen.append(data.sample_ids(batch))
            if len(seen) == batches:
                break
    return seen


def test_vocabulary_is_known_before_any_text_is_read(tmp_path):
    assert LanguageModelingData(files="missing").vocab_size == 256
    assert LanguageModelingData(files="missing", tokenizer="bpe", bpe_vocab_size=300).vocab_size == 300
    assert LanguageModelingData(batch_size=4, block_size=8).tokens_per_batch == 32


def test_blocks_in_order_are_the_text_and_targets_are_one_ahead(data):
    tokens = np.load(data._prepared.folder / "train.npy").tolist()
    batches = [batch for _ in range(5) for batch in data.train_dataloader()]
    inputs, targets = {}, {}
    for batch in batches:
        assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(
            ("input_ids", "targets", "sample_ids"), torch.int64
        )
        assert batch["input_ids"].shape == batch["targets"].shape == (4, BLOCK)
        assert batch["input_ids"].is_contiguous()
        for i, x, y in zip(data.sample_ids(batch), batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
            inputs[i], targets[i] = x, y
    n = (len(tokens) - 1) // BLOCK
    assert sorted(inputs) == list(range(n))
    assert flat(inputs[i] for i in range(n)) == tokens[: n * BLOCK]
    assert flat(targets[i] for i in range(n)) == tokens[1 : n * BLOCK + 1]


def test_length_is_known_without_a_loader(make):
    for batch_size in (1, 4, 7, 100):
        data = make(batch_size=batch_size)
        data.setup()
        assert data.batches_per_epoch() == len(data.train_dataloader()) == len(list(data.train_dataloader()))
    assert data.batches_per_epoch(world_size=3) == 1


@pytest.mark.parametrize("workers", WORKERS)
def test_epoch_after_epoch_nothing_is_dropped(make, workers):
    data = make(**workers)
    data.setup()
    seen = flat(take(data, 25))
    assert [sorted(seen[i : i + 25]) for i in range(0, 100, 25)] == [list(range(25))] * 4


@PARTIAL
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("validation", [{}, {"val_check_interval": 2}, {"limit_val_batches": 0}])
def test_resumed_run_sees_what_the_other_run_saw_from_there(make, tmp_path, workers, validation):
    every_step = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    every_epoch = ModelCheckpoint(tmp_path / "epochs", "{step}", save_on_train_epoch_end=True, save_top_k=-1)
    whole = fit(make(**workers), tmp_path, [every_step, every_epoch], **validation)
    assert len(whole) == 18
    steps = {2: "middle", 6: "last batch", 7: "first batch", 11: "middle", 12: "last batch"}
    if workers["num_workers"]:
        steps = {6: "last batch", 8: "middle"}
    for step in steps:
        resumed = fit(make(**workers), tmp_path, ckpt_path=tmp_path / "steps" / f"step={step}.ckpt", **validation)
        assert resumed == whole[step:], f"after step {step}, {steps[step]}"
    resumed = fit(make(**workers), tmp_path, ckpt_path=tmp_path / "epochs" / "step=12.ckpt", **validation)
    assert resumed == whole[12:], "after the epoch"


@PARTIAL
def test_resumed_run_has_the_state_of_the_other_run(make, tmp_path):
    every_step = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make(), tmp_path, [every_step])
    data = make()
    fit(data, tmp_path, [ModelCheckpoint(tmp_path / "resumed")], ckpt_path=tmp_path / "steps/step=8.ckpt")
    saved = torch.load(tmp_path / "steps/step=18.ckpt", weights_only=True)["LanguageModelingData"]
    assert data.state_dict() == saved
    assert saved["position"] == 18 * 4


def test_epochs_of_limited_length_go_on_in_the_stream(make, tmp_path):
    assert fit(make(), tmp_path, limit_train_batches=4) == fit(make(), tmp_path, max_epochs=2)


def test_overfit_batches_repeats_the_same_batches(make, tmp_path):
    assert fit(make(), tmp_path, overfit_batches=2) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3


@pytest.mark.parametrize("workers", WORKERS)
def test_skip_and_exclude_take_effect_at_the_next_batch(make, workers):
    stream = flat(take_all(make))
    data = make(**workers)
    data.setup()
    loader = iter(data.train_dataloader())
    seen = [data.sample_ids(next(loader)) for _ in range(2)]
    data.skip(5)
    seen += [data.sample_ids(next(loader))]
    assert seen == [stream[:4], stream[4:8], stream[13:17]]
    bad = stream[17:19]
    data.exclude(bad)
    rest = flat(data.sample_ids(batch) for batch in loader)
    assert len(rest) == 3 * 4
    assert rest == [i for i in stream[17:] if i not in bad][:12]
    assert not set(bad) & set(flat(take(data, 30)))


def take_all(make):
    data = make()
    data.setup()
    return take(data, 30)


@pytest.mark.parametrize("workers", WORKERS[:2])
def test_excluded_samples_stay_away_after_a_resume(make, workers):
    data = make(**workers)
    data.setup()
    take(data, 2)
    data.exclude([3, 5, 7])
    state = data.state_dict()
    resumed = make(**workers)
    resumed.load_state_dict(state)
    resumed.setup()
    seen = take(resumed, 20)
    assert seen == take(data, 20)
    assert not {3, 5, 7} & set(flat(seen))


@pytest.mark.parametrize("workers", WORKERS)
def test_going_back_takes_effect_at_the_next_batch(make, workers):
    data = make(**workers)
    data.setup()
    start = data.state_dict()
    loader = iter(data.train_dataloader())
    first = data.sample_ids(next(loader))
    data.load_state_dict(start)
    assert data.sample_ids(next(loader)) == first


def on_rank(data, rank, world_size):
    sampler = {"num_replicas": world_size, "rank": rank}
    data.trainer = SimpleNamespace(
        distributed_sampler_kwargs=sampler,
        state=SimpleNamespace(status="running", fn="fit"),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.setup()
    return data


def test_ranks_share_a_global_batch(make):
    data = make(batch_size=8)
    data.setup()
    ranks = [take(on_rank(make(), rank, 2), 10) for rank in range(2)]
    assert [one + two for one, two in zip(*ranks, strict=True)] == take(data, 10)


def test_number_of_ranks_may_change_on_resume(make):
    stream = flat(take_all(make))
    ranks = [on_rank(make(), rank, 2) for rank in range(2)]
    for data in ranks:
        take(data, 4)
    assert [data.position() for data in ranks] == [32, 32]
    alone = make()
    alone.setup()
    alone.load_state_dict(ranks[1].state_dict())
    assert flat(take(alone, 5)) == stream[32:52]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_evaluation_shards_are_complete_and_of_equal_number(make, world_size, batch_size):
    loaders = [
        on_rank(make(batch_size=batch_size, val_fraction=0.6), rank, world_size).val_dataloader()
        for rank in range(world_size)
    ]
    shards = [[batch["sample_ids"].tolist() for batch in loader] for loader in loaders]
    assert len({len(batches) for batches in shards}) == 1
    assert [len(batches) for batches in shards] == [len(loader) for loader in loaders]
    assert sorted(i for batches in shards for batch in batches for i in batch) == list(range(19))
    assert shards[0][0][0] == 0


def test_fewer_blocks_than_ranks(make):
    with pytest.raises(UsageError, match="validation data of 3 samples cannot be shared over 4 processes"):
        on_rank(make(), 0, 4).val_dataloader()


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_no_worker_outlives_the_fit(make, tmp_path, workers):
    before = set(active_children())
    fit(make(**workers), tmp_path)
    assert set(active_children()) <= before


def test_a_worker_is_sent_the_path_and_not_the_tokens(data):
    blocks = data._splits["train"]
    sent = pickle.dumps(blocks)
    assert len(sent) < 500
    assert torch.equal(
        pickle.loads(sent).__getitems__(np.arange(3))["targets"], blocks.__getitems__(np.arange(3))["targets"]
    )


def test_evaluation_goes_through_each_split_in_order(make, tmp_path):
    data, model = make(batch_size=2), Recorder()
    for run in (Trainer.validate, Trainer.test, Trainer.predict):
        model.evaluated.clear()
        run(trainer(tmp_path), model, datamodule=data)
        assert model.evaluated == [[0, 1], [2]]


@PARTIAL
def test_checkpoint_may_be_evaluated_on_other_text(make, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints")
    fit(make(), tmp_path, [checkpoint])
    data, model = make(block_size=4), Recorder()
    trainer(tmp_path).test(model, datamodule=data, ckpt_path=checkpoint.best_model_path)
    assert data.position() == 0


def test_batch_size_finder_leaves_the_position_alone(make, tmp_path):
    finder = BatchSizeFinder(init_val=1, max_trials=2)
    data = make()
    seen = fit(data, tmp_path, [finder], max_epochs=1)
    assert data.batch_size == 2
    assert seen[6:8] == [take_all(make)[0][:2], take_all(make)[0][2:]]  # after two trials of three steps


@pytest.mark.parametrize("workers", WORKERS)
def test_global_random_state_is_not_touched(make, workers):
    data = make(**workers)
    data.setup()
    seed_everything(0, verbose=False)
    before = torch.get_rng_state()
    take(data, 8)
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_state_is_plain_and_loading_leaves_it_alone(data, tmp_path):
    take(data, 3)
    data.exclude([1])
    state = data.state_dict()
    torch.save(state, tmp_path / "state")
    loaded = torch.load(tmp_path / "state", weights_only=True)
    assert loaded == state
    data.load_state_dict(loaded)
    data.exclude([2])
    take(data, 1)
    assert loaded == state


@pytest.mark.parametrize("change", [{"block_size": 4}, {"seed": 1}, {"val_fraction": 0.2}, {"tokenizer": "bpe"}])
def test_state_of_other_data_is_refused(make, data, change):
    name = {"val_fraction": "corpus_hash"}.get(*change, *change)
    message = f"the checkpoint's place in the data is for {name}=.* has {name}="
    early, late = (make(**{"bpe_vocab_size": 260} | change) for _ in range(2))
    early.load_state_dict(data.state_dict())
    for _ in range(2):
        with pytest.raises(UsageError, match=message):
            early.setup()
    late.setup()
    with pytest.raises(UsageError, match=message):
        late.load_state_dict(data.state_dict() | {"position": 4})
    assert late.position() == 0
    late.setup("validate")


def test_setup_again_changes_nothing(data):
    take(data, 2)
    data.prepare_data()
    data.setup("validate")
    assert data.position() == 8


def test_second_setup_does_not_tokenise(make, data, monkeypatch):
    monkeypatch.setattr("lit_transformer.data.text.cache._encode", None)
    again = make()
    again.prepare_data()
    again.setup()
    assert again.corpus_hash == data.corpus_hash


def test_describe_says_what_there_is(data):
    assert data.describe() == (
        f"files, sha256 {data.corpus_hash[:12]}, tokenizer bytes of 256, blocks of 8\n"
        "train 1 files, 204 bytes, 205 tokens; validation 1 files, 26 bytes, 27 tokens; "
        "test 1 files, 25 bytes, 26 tokens"
    )


def test_trained_tokenizer_arrives_at_setup(make):
    data = make(tokenizer="bpe", bpe_vocab_size=260)
    with pytest.raises(UsageError, match=r"call setup\(\) first"):
        _ = data.tokenizer
    data.setup()
    assert data.vocab_size == data.tokenizer.vocab_size == len(data.token_bytes) == 260


def test_bad_files_that_are_left_out_are_counted(make, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    files = [str(tmp_path / "bad.txt"), str(tmp_path / "text.txt")]
    data = make(files=files, max_bad_records=1)
    with pytest.warns(UserWarning, match=r"1 bad file\(s\) left out"):
        data.prepare_data()
    data.setup()
    assert data.describe().endswith("test 1 files, 25 bytes, 26 tokens; 1 bad files left out")
    with pytest.raises(UsageError, match=r"byte 0, in line 1, of .*bad\.txt"):
        make(files=files).setup()


def test_a_run_on_unigram_tokens_is_resumed_by_data_prepared_anew(make, tmp_path):
    (tmp_path / "words.txt").write_text("the lower, the lowest and the newest of all words\n" * 40)
    settings = {"files": str(tmp_path / "words.txt"), "tokenizer": "unigram", "bpe_vocab_size": 260}
    data = make(**settings)
    assert data.vocab_size == 260
    seen = fit(data, tmp_path, max_epochs=1)
    assert len(seen) > 3
    again = make(**settings, cache_dir=str(tmp_path / "elsewhere"))
    again.load_state_dict(data.state_dict())
    again.setup()
    assert again.position() == data.position() == 4 * len(seen)
    batch = next(iter(again.train_dataloader()))
    assert all(
        data.tokenizer.decode(row) in (tmp_path / "words.txt").read_text() for row in batch["input_ids"].tolist()
    )


def test_too_little_text_for_a_block(make):
    with pytest.raises(UsageError, match=r"at least block_size \+ 1 = 101 tokens of validation text, got 27"):
        make(block_size=100).setup()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("block_size", -1, "block_size must be at least 1, got -1"),
        ("bpe_vocab_size", 256, "bpe_vocab_size must be at least 257, got 256"),
        ("max_bad_records", -1, "max_bad_records must be at least 0, got -1"),
        ("num_workers", -1, "num_workers must be at least 0, got -1"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("val_fraction", 0.0, r"must be above 0 .*, got 0\.0 and 0\.1"),
        ("test_fraction", 0.9, r"leave something to train on, got 0\.1 and 0\.9"),
        ("prefetch_factor", 2, "about worker processes, got num_workers=0"),
        ("persistent_workers", True, "about worker processes, got num_workers=0"),
        ("tokenizer", "byte", "expected tokenizer to be 'bytes', 'bpe', 'unigram', a tokenizer.json, or the folder"),
    ],
)
def test_arguments_out_of_range(make, argument, value, message):
    with pytest.raises(UsageError, match=message):
        make(**{argument: value})
