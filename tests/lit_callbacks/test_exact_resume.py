"""Interrupted anywhere and resumed, a run does to the last bit what the undisturbed one does, in anybody's project."""

import random
import warnings

import numpy
import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from helpers import MemoryLogger, make_trainer, says
from lit_callbacks import ExactResume, SetupError, VerifiedCheckpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata 0.11 with torch 2.13
]


class Numbers(Dataset):
    """Numbered samples; with `augment`, noise from all three global generators."""

    def __init__(self, n=40, augment=False):
        self.x, self.augment = torch.randn(n, 4, generator=torch.Generator().manual_seed(5)), augment

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        x = self.x[index]
        if self.augment:
            x = x + 0.1 * torch.rand(4) + 0.1 * random.random() + 0.1 * float(numpy.random.rand())  # noqa: NPY002 - what people use
        return index, x


class Endless(IterableDataset):
    """A stream without a length, in an order that it draws itself."""

    def __iter__(self):
        data = Numbers()
        for index in torch.randperm(len(data)).tolist():
            yield data[index]


class ByEpoch(Sampler):
    """The order is a function of the epoch, as in DistributedSampler."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 40

    def __iter__(self):
        return iter(torch.randperm(40, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Small(LightningModule):
    """Dropout, a metric of its own, an epoch mean, a plateau scheduler."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)
        self.dropout = torch.nn.Dropout(0.1)
        self.mean = torchmetrics.MeanMetric()
        self.validation_mean = torchmetrics.MeanMetric()

    def loss(self, x):
        return (self.head(self.dropout(torch.tanh(self.layer(x)))) - x.sum(-1, keepdim=True)).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch[1] if not isinstance(batch, dict) else batch["a"][1] + batch["b"][1])
        self.mean.update(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("highest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch[1])
        self.validation_mean.update(loss)
        self.log("val/loss", loss, sync_dist=True)  # a plateau scheduler must see the same on all ranks
        self.log("val/mean", self.validation_mean)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}


class NoValidation(Small):
    validation_step = LightningModule.validation_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Record(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batches = batch.values() if isinstance(batch, dict) else [batch]
        self.seen.append((trainer.current_epoch, batch_idx, [b[0].tolist() for b in batches]))


class Killed(BaseException):
    pass


class Kill(Callback):
    """As after SIGKILL: what is in memory is lost. The `n`-th call of a hook."""

    def __init__(self, hook, n):
        self.left = n
        setattr(self, hook, self._count)

    def _count(self, trainer, *_):
        if not trainer.sanity_checking:
            self.left -= 1
            if self.left == 0:
                raise Killed


LOADERS = {
    "shuffle": lambda workers: DataLoader(Numbers(), 4, shuffle=True, num_workers=workers),
    "augment": lambda workers: DataLoader(Numbers(augment=True), 4, shuffle=True, num_workers=workers),
    "generator": lambda workers: DataLoader(
        Numbers(), 4, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(3)
    ),
    "by_epoch": lambda workers: DataLoader(Numbers(), 4, sampler=ByEpoch(), num_workers=workers),
    "stateful": lambda workers: StatefulDataLoader(  # does not save its workers' random numbers
        Numbers(augment=workers == 0), 4, shuffle=True, num_workers=workers
    ),
    "stateful_by_epoch": lambda workers: StatefulDataLoader(Numbers(), 4, sampler=ByEpoch(), num_workers=workers),
    "endless": lambda workers: DataLoader(Endless(), 4, num_workers=workers),
    "two": lambda workers: {
        "a": DataLoader(Numbers(), 4, shuffle=True, num_workers=workers),
        "b": DataLoader(Numbers(24), 4, shuffle=True, num_workers=workers),
    },
}


def saving(place, accumulate):
    """Settings of a checkpoint: in the middle of an epoch of ten batches, on its last batch, behind it."""
    if place == "behind":
        return {"every_n_epochs": 1, "save_on_train_epoch_end": True}
    steps = {("middle", 1): 4, ("middle", 4): 2, ("last", 1): 10, ("last", 4): 3}
    return {"every_n_train_steps": steps[place, accumulate]}


PLACES = ("middle", "last", "behind")


def fit(
    folder,
    loader,
    *callbacks,
    resume=None,
    every=4,
    save=None,
    epochs=3,
    accumulate=1,
    seed=0,
    exact=True,
    workers=0,
    **options,
):
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002
    module, record, logger = Small(), Record(), MemoryLogger()
    exact = [ExactResume()] if exact else []
    save = save or {"every_n_train_steps": every}
    checkpoint = VerifiedCheckpoint(folder / "checkpoints", "{step}", save_top_k=-1, **save)
    trainer = make_trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=1,
        enable_checkpointing=True,
        logger=logger,
        callbacks=[*exact, *callbacks, record, checkpoint],
        **{"val_check_interval": 5 if loader != "endless" else 1.0, **options},
    )
    killed = False
    try:
        trainer.fit(module, LOADERS[loader](workers), DataLoader(Numbers(12), 4), ckpt_path=resume)
    except Killed:
        killed = True
    rows = {(step, key): value for step, values in logger.calls for key, value in values.items()}
    return module, trainer, record.seen, rows, killed


def check(tmp_path, loader, hook, n, **options):
    """Kill and resume, and compare with the undisturbed run."""
    expected, expected_trainer, seen, rows, _ = fit(tmp_path / "a", loader, **options)
    _, _, first, first_rows, killed = fit(tmp_path / "b", loader, Kill(hook, n), **options)
    assert killed
    actual, trainer, rest, rest_rows, _ = fit(tmp_path / "b", loader, resume="last", seed=99, **options)
    assert len(rest) < len(seen)
    assert rest == seen[-len(rest) :]
    assert first[: len(seen) - len(rest)] + rest == seen
    assert first_rows | rest_rows == rows
    for name, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], value), name
    torch.testing.assert_close(
        trainer.optimizers[0].state_dict(), expected_trainer.optimizers[0].state_dict(), rtol=0, atol=0
    )
    assert trainer.lr_scheduler_configs[0].scheduler.state_dict() == (
        expected_trainer.lr_scheduler_configs[0].scheduler.state_dict()
    )


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_start", "on_train_epoch_end"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("n", [2, 3])
def test_a_killed_run_goes_on_as_the_undisturbed_one(tmp_path, hook, accumulate, n):
    every = 4 if accumulate == 1 else 2
    n = {"on_train_batch_start": 12 + n, "on_validation_batch_start": 5 * n - 4, "on_train_epoch_end": n}[hook]
    check(tmp_path, "shuffle", hook, n, accumulate=accumulate, every=every)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", PLACES)
def test_the_grid(tmp_path, place, workers, accumulate):
    save = saving(place, accumulate)
    check(tmp_path, "augment", "on_train_batch_start", 19, save=save, workers=workers, accumulate=accumulate)


@pytest.mark.parametrize("every", [3, 5, 10, 14])
def test_from_a_save_in_mid_epoch_behind_a_validation_and_at_an_epochs_end(tmp_path, every):
    check(tmp_path, "shuffle", "on_train_batch_start", 19, every=every)


@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "shuffle"])
@pytest.mark.parametrize("every", [4, 10])
def test_any_loader(tmp_path, loader, every):
    check(tmp_path, loader, "on_train_batch_start", 17, every=every)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", PLACES)
def test_the_grid_with_a_loader_that_knows_its_place(tmp_path, place, workers):
    save = saving(place, 1)
    check(tmp_path, "stateful", "on_train_batch_start", 19, save=save, workers=workers)


@pytest.mark.parametrize("loader", ["shuffle", "stateful"])
@pytest.mark.parametrize("place", PLACES)
def test_a_schedule_that_asks_the_trainer_how_long_it_trains(tmp_path, loader, place, monkeypatch):
    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 30
        return configure(self)

    configure = Small.configure_optimizers
    monkeypatch.setattr(Small, "configure_optimizers", configure_optimizers)
    check(tmp_path, loader, "on_train_batch_start", 19, save=saving(place, 1))
    check(tmp_path / "first", loader, "on_train_batch_start", 7)


@pytest.mark.parametrize("loader", ["shuffle", "augment", "endless", "by_epoch"])
def test_with_two_workers(tmp_path, loader):
    check(tmp_path, loader, "on_train_batch_start", 17, every=4, workers=2)


def test_a_finished_run_that_is_made_longer(tmp_path):
    expected, _, seen, rows, _ = fit(tmp_path / "a", "shuffle", epochs=3)
    _, _, first, first_rows, _ = fit(tmp_path / "b", "shuffle", epochs=2)
    actual, _, rest, rest_rows, _ = fit(tmp_path / "b", "shuffle", resume="last", epochs=3)
    assert first + rest == seen
    assert first_rows | rest_rows == rows
    assert all(torch.equal(actual.state_dict()[name], value) for name, value in expected.state_dict().items())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_without_it_the_same_run_is_another(tmp_path):
    with pytest.raises(AssertionError):
        check(tmp_path, "shuffle", "on_train_batch_start", 17, every=4, exact=False)


def test_it_changes_nothing_where_nothing_is_resumed(tmp_path):
    expected, *_ = fit(tmp_path / "a", "augment", exact=False)
    actual, *_ = fit(tmp_path / "b", "augment")
    assert all(torch.equal(actual.state_dict()[name], value) for name, value in expected.state_dict().items())


class DataWithFingerprint(LightningDataModule):
    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def train_dataloader(self):
        return DataLoader(Numbers(), 4)

    def fingerprint(self):
        return {"seed": self.seed}


def test_a_run_of_other_data_is_refused_unless_it_is_wanted(tmp_path):
    def go_on(seed, **options):
        trainer = make_trainer(max_epochs=2, default_root_dir=tmp_path, callbacks=[ExactResume(**options)])
        trainer.fit(NoValidation(), datamodule=DataWithFingerprint(seed), ckpt_path=path if path.exists() else None)
        trainer.save_checkpoint(path)

    path = tmp_path / "some.ckpt"
    go_on(0)
    with pytest.raises(SetupError, match=r"data.seed was 0 and is 1.*ExactResume\(allow_changes=True\)"):
        go_on(1)
    go_on(1, allow_changes=True)


def test_everything_in_a_checkpoint_is_plain(tmp_path):
    fit(tmp_path, "two", epochs=1)
    path = tmp_path / "checkpoints" / "step=4.ckpt"
    saved = torch.load(path, weights_only=True)["exact_resume"]
    assert saved["fingerprint"]["world_size"] == 1
    assert saved["pending"]["step"] == 3
    assert set(saved["ranks"][0]["now"]["metrics"]) == {"mean", "validation_mean"}


def test_a_checkpoint_without_it_is_gone_on_from_and_said(tmp_path):
    fit(tmp_path, "shuffle", exact=False, epochs=1)
    with (
        says("one without ExactResume"),
        pytest.warns(UserWarning, match="ended before the epoch ended"),
    ):
        fit(tmp_path, "shuffle", resume=str(tmp_path / "checkpoints" / "step=4.ckpt"), epochs=1)


def test_nothing_is_left_behind(tmp_path):
    before = list(warnings.filters)
    _, trainer, *_ = fit(tmp_path, "shuffle", Kill("on_train_batch_start", 3))
    assert "_load_combined_loader_states" not in vars(trainer.fit_loop)
    _, trainer, *_ = fit(tmp_path, "shuffle", Kill("on_sanity_check_start", 1))
    assert "_load_combined_loader_states" not in vars(trainer.fit_loop)
    fit(tmp_path, "shuffle", epochs=1)
    fit(tmp_path, "shuffle", resume=str(tmp_path / "checkpoints" / "step=4.ckpt"))
    assert list(warnings.filters) == before
