import copy
import json
import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

import lit_callbacks._room
from helpers import (
    MemoryLogger,
    TinyLM,
    Tokens,
    TokensWithIds,
    TwoOptimizers,
    assert_identical,
    loader,
    snapshot,
)
from lit_callbacks import DivergenceError, LossSpikeRecovery, NonFiniteGuard, SetupError
from lit_callbacks.rules import BestLossRatio, RobustRule, SixSigma
from lit_callbacks.testing import Fault, FaultInjector

QUICK = {"rule": RobustRule(window=20, least=10), "snapshot_every_n_steps": 10, "prove_steps": 5}


class Scheduled(TinyLM):
    """With a schedule that multiplies what it finds."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(make_trainer, data, *callbacks, module=TinyLM, faults=(), recovery=None, **options):
    torch.manual_seed(0)
    module = module(dropout=0.1, batch_norm=True, lr=1e-3) if isinstance(module, type) else module
    recovery = LossSpikeRecovery(**QUICK) if recovery is None else recovery
    injector, logger = FaultInjector(faults), MemoryLogger()
    trainer = make_trainer(
        callbacks=[recovery, *callbacks, *([injector] if faults else [])], logger=logger, **{"max_epochs": 1, **options}
    )
    trainer.fit(module, data)
    injector.assert_all_fired()
    return snapshot(module, trainer), recovery, trainer


def history(recovery):
    return recovery.state_dict()["report"]["history"]


def recovery_of(trainer):
    return next(callback for callback in trainer.callbacks if isinstance(callback, LossSpikeRecovery))


def counts(recovery):
    return recovery.state_dict()["report"]["counts"]


def events(tmp_path):
    return [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]


def scaler():
    """A GradScaler that has found its factor."""
    gradient_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    return {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=gradient_scaler)]}


SETTINGS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"scaler": True},
        {"scaler": True, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ],
    ids=str,
)


def spread(options):
    options = dict(options)
    return {**(scaler() if options.pop("scaler", False) else {}), **options}


def scale_of(trainer):
    gradient_scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if gradient_scaler is None else gradient_scaler.state_dict()


@SETTINGS
@pytest.mark.parametrize("fault", ["spike", "nan"])
def test_after_a_skip_the_bad_batch_has_never_been(make_trainer, options, fault):
    micro = options.get("accumulate_grad_batches", 1)
    sample, window = (20 * micro + micro - 1) * 4 + 1, range(20 * micro, 21 * micro)
    n_samples = 30 * micro * 4
    bad, recovery, trainer = fit(make_trainer, loader(faults={sample: fault}, n_samples=n_samples), **spread(options))
    good, _, clean = fit(make_trainer, loader(without=window, n_samples=n_samples), **spread(options))
    assert history(recovery) == [[20, "skip"]]
    assert_identical(bad, good)
    assert scale_of(trainer) == scale_of(clean)


def test_with_a_schedule_a_skipped_step_is_a_step_that_does_nothing(make_trainer):
    class StepsTheScheduleAtTheGap(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 20:
                trainer.lr_scheduler_configs[0].scheduler.step()

    bad, *_ = fit(make_trainer, loader(faults={81: "spike"}, n_samples=160), module=Scheduled)
    good, *_ = fit(make_trainer, loader(without=[20], n_samples=160), StepsTheScheduleAtTheGap(), module=Scheduled)
    assert_identical(bad, good)


def seen_and_passed_over(step, snapshot, micro=1):
    return range(snapshot * micro, (step + 1) * micro)


@SETTINGS
@pytest.mark.parametrize("kind", ["nan_weight", "nan_optimizer_state"])
def test_after_a_rollback_the_run_is_a_replay_without_what_was_seen_in_between(make_trainer, tmp_path, options, kind):
    micro = options.get("accumulate_grad_batches", 1)
    data, faults = {"n_samples": 50 * micro * 4}, [Fault(kind, step=27)]
    bad, recovery, trainer = fit(make_trainer, loader(**data), faults=faults, **spread(options))
    ((step, action),) = history(recovery)
    (event,) = events(tmp_path)
    # A gradient that is not finite may be the scaler's search, but not for long. Whether attention lets a NaN through
    # to the loss, where it is none, depends on the processor: torch's kernels with AVX-512 do not.
    late = 2 if "scaler" in options and event["rule"] == "non_finite_gradient" else 0
    assert (step, action) == (27 + late + (kind == "nan_optimizer_state"), "rollback")
    passed_over = seen_and_passed_over(step, 21, micro)  # snapshots at 1, 11, 21; 22 is five before the fault
    good, _, clean = fit(make_trainer, loader(without=passed_over, **data), **spread(options))
    assert_identical(bad, good)
    assert scale_of(trainer) == scale_of(clean)
    assert counts(recovery)["steps_lost"] == step - 21


def test_a_second_rollback_to_the_same_snapshot_is_exact_and_passes_over_more(make_trainer):
    faults = [Fault("nan_weight", step=27), Fault("nan_weight", step=29)]
    bad, recovery, trainer = fit(make_trainer, loader(n_samples=280), faults=faults)
    assert history(recovery) == [[27, "rollback"], [29, "rollback"]]
    # The snapshot was taken with batch 21 in hand; 8 more were seen by step 29, and as many are drawn and dropped.
    good, *_ = fit(make_trainer, loader(without=range(21, 38), n_samples=280))
    assert_identical(bad, good)
    assert trainer.fit_loop.epoch_loop.batch_progress.current.completed == 70
    assert trainer.global_step == 62


def test_a_rollback_over_a_decay_of_the_learning_rate_stays_on_schedule(make_trainer):
    _, recovery, trainer = fit(
        make_trainer, loader(n_samples=160), module=Scheduled, faults=[Fault("nan_weight", step=32)]
    )
    assert counts(recovery)["rollbacks"] == 1
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == trainer.global_step == 40


def test_a_lowered_learning_rate_is_seen_by_the_step_alone_and_comes_back(make_trainer):
    inside, outside = [], []

    class Watch(Callback):
        def on_fit_start(self, trainer, pl_module):
            recovery._ladder.state.lr_factor = 0.25

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            inside.append(optimizer.param_groups[0]["lr"])  # after the recovery, which comes first

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            outside.append(trainer.optimizers[0].param_groups[0]["lr"])

    recovery = LossSpikeRecovery(**QUICK, cooldown_steps=5)
    fit(make_trainer, loader(n_samples=160), Watch(), module=Scheduled, recovery=recovery)
    assert inside == pytest.approx([0.25e-3] * 5 + [0.5e-3] * 5 + [1e-3] * 20 + [1e-4] * 10)
    assert outside == pytest.approx([1e-3] * 29 + [1e-4] * 11)


@pytest.mark.parametrize("kind", ["nan_weight", "bit_flip"])
def test_a_run_that_is_resumed_right_after_a_rollback_decides_as_the_other(make_trainer, tmp_path, kind):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 31:
                trainer.save_checkpoint(tmp_path / "31.ckpt")

    def data(without=()):
        batches = [list(range(i, i + 4)) for i in range(0, 320, 4)][len(without) :]
        return Continues(Tokens(320, faults={161: "spike", 241: "nan"}), batch_sampler=batches)

    torch.manual_seed(0)
    initial, faults = TinyLM(lr=1e-3), [Fault(kind, step=27, where="head.weight")]
    whole, recovery, _ = fit(make_trainer, data(), Save(), module=copy.deepcopy(initial), faults=faults)
    resumed, module = LossSpikeRecovery(**QUICK), TinyLM(lr=1e-3)
    assert history(recovery)[0][0] < 31
    trainer = make_trainer(max_epochs=1, callbacks=[resumed])
    trainer.fit(module, data(without=range(31)), ckpt_path=tmp_path / "31.ckpt", weights_only=True)
    assert_identical(snapshot(module, trainer), whole)
    assert history(resumed) == history(recovery)
    assert resumed.state_dict() == recovery.state_dict()


class Continues(torch.utils.data.DataLoader):
    """Begins where the other run was, and tells Lightning so."""

    def __len__(self):
        return 80

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_damage_that_no_loss_shows_is_found_when_a_snapshot_is_taken(make_trainer, tmp_path):
    class Idle(TinyLM):
        def __init__(self, **options):
            super().__init__(**options)
            self.idle = torch.nn.Parameter(torch.zeros(3))

    class Strike(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 14:
                pl_module.idle.data[1] = math.nan

    final, recovery, _ = fit(make_trainer, loader(n_samples=160), Strike(), module=Idle)
    assert history(recovery) == [[21, "rollback"]]
    assert final[0]["idle"].isfinite().all()
    (event,) = events(tmp_path)
    assert (event["rule"], event["to_step"]) == ("weights_or_optimizer_state_not_finite", 11)


def test_averaged_weights_go_back_too(make_trainer):
    class Average(EMAWeightAveraging):
        def __init__(self):
            super().__init__(decay=0.9)

        def on_train_end(self, trainer, pl_module):
            self.final = {name: value.clone() for name, value in self._average_model.state_dict().items()}

    average = Average()
    fit(make_trainer, loader(n_samples=160), average, faults=[Fault("nan_weight", step=27)])
    assert all(value.isfinite().all() for value in average.final.values())


def test_frozen_parameters_are_not_copied_and_a_rollback_leaves_them(make_trainer):
    module = TinyLM(lr=1e-3)
    module.embedding.requires_grad_(False)
    before = module.embedding.weight.clone()
    sizes = []

    class Measure(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ring = recovery_of(trainer).rewinder._ring
            sizes.append(ring and {name for snapshot in ring.snapshots for name in snapshot._saved})

    fit(make_trainer, loader(n_samples=160), Measure(), module=module, faults=[Fault("nan_weight", step=27)])
    assert torch.equal(module.embedding.weight, before)
    assert "head.weight" in sizes[-1]
    assert "embedding.weight" not in sizes[-1]


def test_snapshots_are_copied_into_the_same_room(make_trainer):
    pointers = set()

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ring = recovery_of(trainer).rewinder._ring
            for one in [*ring.snapshots, *ring._spare] if ring else []:
                pointers.add(one._saved["head.weight"].data_ptr())

    recovery = LossSpikeRecovery(**QUICK, keep_snapshots=3)
    fit(make_trainer, loader(n_samples=480), Look(), recovery=recovery, faults=[Fault("nan_weight", step=57)])
    assert len(pointers) == 3


class Positioned(TokensWithIds):
    """A data module that can move on, and leave samples out."""

    skipped, excluded, drawn = (), (), 0

    def train_dataloader(self):
        for batch in super().train_dataloader():
            self.drawn += 1
            yield batch

    def position(self):
        return 4 * self.drawn

    def skip(self, n):
        self.skipped = (*self.skipped, n)

    def exclude(self, ids):
        self.excluded = (*self.excluded, *ids)


class Endless(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return self.data()


def test_a_data_module_that_can_is_asked_to_move_on_and_to_leave_out(make_trainer, tmp_path):
    data = Positioned(n_samples=240, faults={121: "nan"})
    generator = data.train_dataloader
    data.train_dataloader = lambda: torch.utils.data.DataLoader(Endless(generator), batch_size=None)
    fit(make_trainer, data, faults=[Fault("nan_weight", step=40), Fault("nan_weight", step=43)])
    assert data.excluded == (120, 121, 122, 123)
    # The second time: what was seen from the snapshot at step 32, after the skip at 30, to step 43.
    assert data.skipped == (4 * 11,)
    jump = [event for event in events(tmp_path) if event["event"] == "jump"]
    assert jump == [{"step": 44, "event": "jump", "passed_over": "44 samples"}]


def test_a_new_level_of_the_data_is_accepted_and_the_run_goes_on(make_trainer):
    faults = dict.fromkeys(range(100, 400), "spike")
    _, recovery, _ = fit(make_trainer, loader(faults=faults, n_samples=400))
    assert [action for _, action in history(recovery)] == ["skip"] * 11 + ["accept"]
    assert counts(recovery)["rollbacks"] == 0


def test_an_announced_level_is_not_looked_at(make_trainer):
    recovery = LossSpikeRecovery(**QUICK)

    class Curriculum(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 25:
                recovery.expect_shift()

    faults = dict.fromkeys(range(100, 200), "spike")
    fit(make_trainer, loader(faults=faults, n_samples=200), Curriculum(), recovery=recovery)
    assert history(recovery) == []


def test_damage_that_cannot_be_undone_ends_the_run_with_a_good_checkpoint(make_trainer, tmp_path):
    class Breaks(Callback):
        """Something that destroys the weights again and again."""

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx > 25:
                pl_module.head.weight.data.fill_(math.nan)

    recovery = LossSpikeRecovery(**QUICK, max_rollbacks=2)
    with pytest.raises(DivergenceError, match=r"Stopped at step 30: not finite.*last_good.ckpt.*gradient_clip_val=1.0"):
        fit(make_trainer, loader(n_samples=160), Breaks(), recovery=recovery)
    assert [action for _, action in history(recovery)] == ["rollback", "rollback", "stop"]
    saved = torch.load(tmp_path / "last_good.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert saved["global_step"] == 30


def test_damage_before_there_is_anything_to_go_back_to_ends_the_run_without_a_checkpoint(make_trainer, tmp_path):
    with pytest.raises(DivergenceError, match="Stopped at step 1: not finite, and there is no good snapshot"):
        fit(make_trainer, loader(n_samples=160), faults=[Fault("nan_weight", step=0)])
    assert not (tmp_path / "last_good.ckpt").exists()


def test_a_second_fit_begins_anew(make_trainer):
    recovery = LossSpikeRecovery(**QUICK)
    fit(make_trainer, loader(faults={81: "nan"}, n_samples=160), recovery=recovery)
    assert counts(recovery)["skipped_steps"] == 1
    faults = dict.fromkeys(range(160), "spike")  # another level from the start, which would be an anomaly in the first
    fit(make_trainer, loader(faults=faults, n_samples=160), recovery=recovery)
    assert history(recovery) == []


def test_events_and_metrics_tell_what_was_done(make_trainer, tmp_path):
    data = TokensWithIds(n_samples=160, faults={81: "spike"})
    _, _, trainer = fit(make_trainer, data, faults=[Fault("nan_weight", step=37)])
    skip, rollback = events(tmp_path)
    assert skip.pop("score") > 6
    assert skip.pop("loss") > 10
    assert skip.pop("grad_norm") > 0
    assert skip.pop("text").endswith("The step is skipped.")
    assert skip == {
        "step": 20, "event": "skip", "rule": "loss", "anomalies": 1, "lr_factor": 1.0, "sample_ids": [80, 81, 82, 83],
    }  # fmt: skip
    assert (rollback["event"], rollback["to_step"]) == ("rollback", 32)
    assert rollback["rule"] in ("non_finite_loss", "non_finite_gradient")  # the processor's choice, see above
    assert "The weights go back to those of step 32." in rollback["text"]
    found = {key: value.item() for key, value in trainer.callback_metrics.items()}
    score = found.pop("loss_spike/score")
    assert score == math.inf
    assert found == {
        "loss_spike/skipped_steps": 2.0, "loss_spike/rollbacks": 1.0, "loss_spike/steps_lost": 5.0,
        "loss_spike/nonfinite": 1.0, "loss_spike/accepted": 0.0, "loss_spike/lr_factor": 1.0,
    }  # fmt: skip


def test_many_skipped_steps_are_explained_once(make_trainer):
    recovery = LossSpikeRecovery(**QUICK)

    class Long(Callback):
        def on_fit_start(self, trainer, pl_module):
            recovery._report.counts.update(steps=600, skipped_steps=20)

    with pytest.warns(UserWarning, match="21 of 621 steps have been skipped. Where data is not shuffled") as warned:
        fit(make_trainer, loader(faults={81: "spike", 121: "spike"}, n_samples=160), Long(), recovery=recovery)
    assert sum("have been skipped" in str(warning.message) for warning in warned) == 1


def test_room_for_snapshots(make_trainer, monkeypatch, tmp_path):
    def run(memory, disk):
        monkeypatch.setattr(lit_callbacks._room, "available_memory", lambda: memory)
        monkeypatch.setattr(lit_callbacks._room.shutil, "disk_usage", lambda path: type("", (), {"free": disk}))
        return fit(make_trainer, loader(n_samples=160), faults=[Fault("nan_weight", step=27)])

    wanted, *_ = run(2**40, 2**40)
    with pytest.warns(UserWarning, match="0 MiB of host memory, so only 3 instead of 5 are kept"):
        fewer, *_ = run(2 * 3 * 60_000, 0)
    with pytest.warns(UserWarning, match=f"2 are kept on disk, in {tmp_path}"):
        on_disk, *_ = run(0, 2**40)
    assert_identical(fewer, wanted)
    assert_identical(on_disk, wanted)
    assert not list(tmp_path.glob(".snapshot*"))
    with (
        pytest.warns(UserWarning, match="neither memory nor disk has room"),
        pytest.raises(DivergenceError, match="Stopped at step 28"),
    ):
        run(0, 0)


def test_a_module_that_cannot_be_run_again_is_recovered_without_a_look(make_trainer):
    class Once(TinyLM):
        def __init__(self):
            super().__init__(lr=1e-3)
            self.seen = set()

        def training_step(self, batch, batch_idx):
            if batch_idx in self.seen:
                raise RuntimeError("only once")
            self.seen.add(batch_idx)
            return super().training_step(batch, batch_idx)

    faults = dict.fromkeys(range(100, 400), "spike")
    module = Once()
    _, recovery, _ = fit(make_trainer, loader(faults=faults, n_samples=400), module=module)
    expected = ["skip"] * 11 + ["rollback"] + ["skip"] * 11 + ["accept"]
    assert [action for _, action in history(recovery)] == expected


@pytest.mark.parametrize("rule", [SixSigma(window=20), BestLossRatio(threshold=3.0)], ids=repr)
def test_other_rules_can_be_used(make_trainer, rule):
    _, recovery, _ = fit(
        make_trainer, loader(faults={101: "spike"}, n_samples=160), recovery=LossSpikeRecovery(rule, prove_steps=5)
    )
    assert history(recovery) == [[25, "skip"]]


class CountsInItsGroup(torch.optim.SGD):
    """Counts the steps that had a gradient, in its group."""

    always = False

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            has_gradient = any(p.grad is not None for p in group["params"])
            group["k"] = group.get("k", 0) + (self.always or has_gradient)
        return loss


class CountsAlways(CountsInItsGroup):
    """Counts in its group, gradients or not, as those of pytorch-optimizer do."""

    always = True


@pytest.mark.parametrize("optimizer", [CountsInItsGroup, CountsAlways])
def test_a_counter_in_a_group_goes_back(make_trainer, optimizer):
    module = TinyLM(optimizer=optimizer, lr=1e-3)
    _, _, trainer = fit(make_trainer, loader(n_samples=160), module=module, faults=[Fault("nan_weight", step=27)])
    assert trainer.global_step == 40
    assert trainer.optimizers[0].param_groups[0]["k"] == 40 - (28 - 21)


@pytest.mark.parametrize("optimizer", [CountsInItsGroup, CountsAlways])
def test_a_skipped_step_does_not_count_in_a_group(make_trainer, optimizer):
    module = TinyLM(optimizer=optimizer, lr=1e-3)
    _, recovery, trainer = fit(make_trainer, loader(faults={101: "nan"}, n_samples=160), module=module)
    assert history(recovery) == [[25, "skip"]]
    assert trainer.optimizers[0].param_groups[0]["k"] == 39


@pytest.mark.parametrize(
    ("module", "callbacks", "options", "message"),
    [
        (TwoOptimizers(), [], {"max_epochs": None, "max_steps": 2}, "needs automatic optimization"),
        (TinyLM(), [LossSpikeRecovery(patience=3)], {}, "there is a LossSpikeRecovery too"),
        (TinyLM(), [NonFiniteGuard()], {}, "what NonFiniteGuard does: leave the other one out"),
        (TinyLM(fused=True), [], scaler(), "Use fused=False"),
    ],
    ids=["manual", "two", "guard", "fused"],
)
def test_what_it_cannot_serve_is_refused(make_trainer, module, callbacks, options, message):
    with pytest.raises(SetupError, match=message):
        fit(make_trainer, loader(), *callbacks, module=module, **options)


def test_snapshots_that_do_not_reach_back_far_enough_are_refused():
    with pytest.raises(ValueError, match=r"prove_steps must be at most .* = 20, .*, got 21"):
        LossSpikeRecovery(snapshot_every_n_steps=10, keep_snapshots=3, prove_steps=21)


def test_a_snapshot_is_taken_when_parameters_are_unfrozen(make_trainer):
    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 25:
                pl_module.head.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.head.parameters())})

    class Partly(TinyLM):
        def configure_optimizers(self):
            self.head.requires_grad_(False)
            return self.make_optimizer([p for p in self.parameters() if p.requires_grad])

    faults = [Fault("nan_weight", step=27, where="head.weight")]
    final, recovery, _ = fit(make_trainer, loader(n_samples=200), Unfreeze(), module=Partly, faults=faults)
    assert history(recovery) == [[27, "rollback"]]
    assert counts(recovery)["steps_lost"] == 2  # to the only snapshot that holds the head
    assert final[0]["head.weight"].isfinite().all()
