"""Recovery in runs that are unusual, but nobody's fault."""

import copy
import math
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, IterableDataset

from helpers import TinyLM, Tokens, assert_identical, loader, snapshot
from lit_callbacks import DivergenceError, LossSpikeRecovery, NonFiniteGuard
from lit_callbacks.rules import RobustRule
from lit_callbacks.testing import Fault, FaultInjector

TWICE = [Fault("nan_weight", step=27), Fault("nan_weight", step=29)]


def recovery(**options):
    rule = RobustRule(window=20, least=10)
    return LossSpikeRecovery(rule, **{"snapshot_every_n_steps": 10, "prove_steps": 5, **options})


def fit(make_trainer, module, data, *callbacks, faults=(), guard=None, val=None, **options):
    torch.manual_seed(0)
    guard = guard or recovery()
    trainer = make_trainer(callbacks=[guard, FaultInjector(faults), *callbacks], **{"max_epochs": 1, **options})
    trainer.fit(module(lr=1e-3) if isinstance(module, type) else module, data, val)
    return trainer, guard.state_dict()["report"]["history"] if isinstance(guard, LossSpikeRecovery) else []


class Hit(Callback):
    """Sets one element of a parameter after a batch."""

    def __init__(self, name, at=27, value=math.nan):
        self.name, self.at, self.value = name, at, value

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.at:
            pl_module.get_parameter(self.name).data.view(-1)[0] = self.value


@pytest.mark.parametrize("value", [-math.inf, math.inf, torch.finfo(torch.float32).min])
def test_buffers_that_are_infinite_by_intention_are_none_of_its_business(make_trainer, value):
    module = TinyLM(lr=1e-3)
    module.register_buffer("mask", torch.full((9, 9), value).triu(1))
    _, history = fit(make_trainer, module, loader(n_samples=160), faults=[Fault("nan_weight", step=27)])
    assert history == [[27, "rollback"]]


class Hinged(TinyLM):
    """Most losses are zero."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx).sub(100).relu()


def test_a_loss_that_is_zero_is_fine(make_trainer):
    assert fit(make_trainer, Hinged, loader(n_samples=160))[1] == []


class Logged(TinyLM):
    """Logs the mean of an epoch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_epoch=True)
        return loss


@pytest.mark.parametrize("guard", [recovery, NonFiniteGuard])
def test_a_skipped_step_is_not_in_the_mean_of_the_epoch(make_trainer, guard):
    stop = EarlyStopping("train_loss_epoch")
    data = loader(faults={81: "nan"}, n_samples=160)
    bad, _ = fit(make_trainer, Logged, data, stop, guard=guard(), max_epochs=2)
    good, _ = fit(make_trainer, Logged, loader(without=[20], n_samples=160), guard=guard(), max_epochs=2)
    assert bad.current_epoch == 2
    assert bad.callback_metrics["train_loss_epoch"] == good.callback_metrics["train_loss_epoch"]


class DrawsItself(TinyLM):
    """Takes its batches from the iterator."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_that_draws_its_own_batches_can_be_skipped(make_trainer):
    trainer, history = fit(make_trainer, DrawsItself, loader(faults={81: "nan"}, n_samples=160))
    assert [kind for _, kind in history] == ["skip"]
    assert trainer.global_step == 40


def test_groups_that_are_empty_or_frozen_at_first_are_no_reason_to_refuse(make_trainer):
    class Groups(TinyLM):
        def configure_optimizers(self):
            mask = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
            return torch.optim.AdamW([{"params": []}, {"params": [mask, *self.parameters()]}], lr=1e-3)

    _, history = fit(make_trainer, Groups(), loader(n_samples=160), faults=[Fault("nan_weight", step=27)])
    assert history == [[27, "rollback"]]


def test_lazy_modules_and_growing_buffers_are_followed(make_trainer):
    class Grows(TinyLM):
        def __init__(self, **options):
            super().__init__(**options)
            self.norm = torch.nn.LazyBatchNorm1d()
            self.register_buffer("history", torch.zeros(1))

        def training_step(self, batch, batch_idx):
            self.history = torch.cat([self.history, torch.ones(1)])
            return super().training_step(batch, batch_idx)

    module = Grows(lr=1e-3)
    _, history = fit(make_trainer, module, loader(faults={81: "nan"}, n_samples=160))
    assert history == [[20, "skip"]]
    assert len(module.history) == 40  # one for each step but the one that was taken back


class Taught(TinyLM):
    """With a teacher that follows the head, without gradients."""

    def __init__(self, **options):
        super().__init__(**options)
        self.teacher = copy.deepcopy(self.head).requires_grad_(False)

    def on_train_batch_end(self, *args):
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.head.parameters(), strict=True):
                slow.lerp_(fast, 0.1)


def test_a_teacher_goes_back_with_its_student(make_trainer):
    module = Taught(lr=1e-3)
    _, history = fit(make_trainer, module, loader(n_samples=240), Hit("head.weight"))
    assert [kind for _, kind in history] == ["rollback"]
    assert all(parameter.isfinite().all() for parameter in module.parameters())


class Random(IterableDataset):
    """Draws its data from the random numbers of the process, as a bare `get_batch` does."""

    def __init__(self):
        self.drawn = []

    def __iter__(self):
        for _ in range(160):
            self.drawn.append(torch.randint(32, (9,)))
            yield {"tokens": self.drawn[-1], "loss_factor": 1.0, "bad_gradient": False}


def test_random_data_does_not_come_again_after_a_rollback(make_trainer):
    data = Random()
    _, history = fit(make_trainer, TinyLM, DataLoader(data, batch_size=4), faults=[Fault("nan_weight", step=27)])
    assert history == [[27, "rollback"]]
    assert len({tuple(sample.tolist()) for sample in data.drawn}) == 160


class Unsized(IterableDataset):
    """Thirty-three batches of four, and nobody knows."""

    def __iter__(self):
        return iter(Tokens(4 * 33))


class Decays(TinyLM):
    """By epochs."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]


class Validations(Callback):
    def __init__(self):
        self.after = []

    def on_validation_end(self, trainer, pl_module):
        self.after.append(trainer.fit_loop.epoch_loop.batch_progress.current.ready)


@pytest.mark.parametrize(
    ("data", "interval", "expected"),
    [
        (lambda: DataLoader(Unsized(), batch_size=4), None, [33]),
        (lambda: loader(n_samples=160), None, [40]),
        (lambda: loader(n_samples=200), 10, [10, 20, 30, 40, 50]),
    ],
    ids=["unsized", "sized", "interval"],
)
def test_passing_over_data_leaves_validation_and_the_epochs_schedule_alone(make_trainer, data, interval, expected):
    seen, module = Validations(), Decays(lr=1e-3)
    trainer, history = fit(
        make_trainer, module, data(), seen, faults=TWICE, val=loader(n_samples=8), val_check_interval=interval,
        num_sanity_val_steps=0,
    )  # fmt: skip
    assert [kind for _, kind in history] == ["rollback"] * 2
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    assert len(seen.after) == len(expected)


def test_a_run_resumed_in_an_open_episode_can_go_back(make_trainer, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 20:
                trainer.save_checkpoint(tmp_path / "open.ckpt")

    data = loader(faults={81: "spike"}, n_samples=160)
    fit(make_trainer, TinyLM, data, Save())
    torch.manual_seed(0)
    guard = recovery()
    callbacks = [guard, FaultInjector([Fault("nan_weight", step=22)])]
    trainer = make_trainer(max_epochs=2, callbacks=callbacks)
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        trainer.fit(TinyLM(lr=1e-3), data, ckpt_path=tmp_path / "open.ckpt", weights_only=True)
    assert guard.state_dict()["report"]["history"][1] == [22, "rollback"]


def test_a_step_that_writes_to_its_batch_does_not_make_weights_look_damaged(make_trainer):
    class InPlace(TinyLM):
        def training_step(self, batch, batch_idx):
            batch["loss_factor"].mul_(3.0)
            return self.loss(batch)

    faults = dict.fromkeys(range(240, 252), "spike")
    _, history = fit(make_trainer, InPlace, loader(faults=faults, n_samples=320))
    assert [kind for _, kind in history] == ["skip"] * 3


def test_a_cleared_optimizer_state_is_brought_back(make_trainer):
    class Clears(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 26:
                trainer.optimizers[0].state.clear()
                pl_module.head.weight.data[0] = math.nan

    final, history = fit(make_trainer, TinyLM, loader(n_samples=160), Clears())
    assert [kind for _, kind in history] == ["rollback"]
    good, _ = fit(make_trainer, TinyLM, loader(without=range(21, 28), n_samples=160))
    assert_identical(snapshot(final.lightning_module, final), snapshot(good.lightning_module, good))


def test_what_is_damaged_for_good_is_named(make_trainer):
    module = TinyLM(lr=1e-3)
    module.embedding.requires_grad_(False)
    with pytest.raises(DivergenceError, match=r"what is damaged is embedding.weight, of which snapshots have no copy"):
        fit(make_trainer, module, loader(n_samples=160), Hit("embedding.weight"))


def test_it_can_be_pickled_in_the_middle_of_a_fit(make_trainer):
    class Pickle(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 15:
                self.size = len(pickle.dumps(trainer.callbacks[0]))

    pickled = Pickle()
    fit(make_trainer, TinyLM, loader(n_samples=160), pickled)
    assert pickled.size < 100_000


def test_every_step_can_have_hooks_of_others_when_the_learning_rate_is_lowered(make_trainer):
    guard, calls = recovery(), []

    class Late(Callback):
        def on_fit_start(self, trainer, pl_module):
            guard._ladder.state.lr_factor = 0.5

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            handle = optimizer.register_step_post_hook(lambda *_: (calls.append(1), handle.remove()))

    fit(make_trainer, TinyLM, loader(n_samples=40), Late(), guard=guard)
    assert len(calls) == 10


def test_the_order_in_which_an_optimizer_keeps_its_state_does_not_matter(make_trainer):
    class Reorders(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 15:  # between two snapshots
                state = trainer.optimizers[0].state
                for parameter in list(state):
                    state[parameter] = dict(reversed(state.pop(parameter).items()))

    faults = [Fault("nan_weight", step=67)]  # the room of the first snapshot has been used again by then
    final, history = fit(make_trainer, TinyLM, loader(n_samples=320), Reorders(), faults=faults)
    assert history == [[67, "rollback"]]
    good, _ = fit(make_trainer, TinyLM, loader(without=range(61, 68), n_samples=320), Reorders())
    torch.testing.assert_close(final.lightning_module.state_dict(), good.lightning_module.state_dict(), rtol=0, atol=0)


def test_a_last_checkpoint_that_cannot_be_written_does_not_hide_why_the_run_was_stopped(make_trainer, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    class Full(Callback):
        def on_fit_start(self, trainer, pl_module):
            monkeypatch.setattr(trainer, "save_checkpoint", full)

    with pytest.raises(DivergenceError, match=r"not finite, and going back does not help.*No space left"):
        fit(make_trainer, TinyLM, loader(n_samples=160), Full(), guard=recovery(max_rollbacks=1), faults=TWICE)


def test_no_hook_stays_on_the_optimizer_after_an_exception(make_trainer):
    guard = recovery()

    class Break(Callback):
        def on_fit_start(self, trainer, pl_module):
            guard._ladder.state.lr_factor = 0.5

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.optimizer = optimizer
            raise KeyError("broken")

    broken = Break()
    with pytest.raises(KeyError, match="broken"):
        fit(make_trainer, TinyLM, loader(n_samples=40), broken, guard=guard)
    assert not broken.optimizer._optimizer_step_post_hooks
