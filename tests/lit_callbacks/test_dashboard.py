"""What those who watch a run from afar get to see."""

import json
import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import lit_callbacks
from helpers import MemoryLogger, TinyLM, TwoOptimizers, assert_identical, loader, snapshot
from lit_callbacks import (
    AttentionEntropyMonitor,
    Dashboard,
    DeadNeuronDetector,
    GradientNormLogger,
    LossSpikeRecovery,
    NonFiniteError,
    NonFiniteGuard,
)
from lit_callbacks._heard import Heard
from lit_callbacks._heat_maps import draw, heat_maps
from lit_callbacks._trace import Trace
from lit_callbacks._wandb_runs import Alerts, event_rows, is_of_a_part
from lit_callbacks.health import diagnose
from lit_callbacks.testing import Fault, FaultInjector

HEAT_MAPS = {"heat_maps/attention_entropy", "heat_maps/grad_norm", "heat_maps/dead_neurons"}


class FakeRun:
    """Remembers alerts, summary and definitions."""

    def __init__(self):
        self.alerts, self.summary, self.tags, self.id, self.defined = [], {}, ("mine",), "abc", {}
        self.hidden = []

    def alert(self, title, text, wait_duration):
        self.alerts.append((title, text))

    def define_metric(self, key, step_metric, summary=None, hidden=False):
        assert step_metric == "trainer/global_step"
        if hidden:
            self.hidden.append(key)
        else:
            self.defined[key] = summary


class FakeWandb(MemoryLogger):
    def __init__(self):
        super().__init__()
        self.experiment, self.images, self.tables = FakeRun(), [], []

    def log_image(self, key, images, step):
        self.images.append((key, step))

    def log_table(self, key, columns, data, step):
        self.tables.append((key, step, data))


FakeWandb.__name__ = "WandbLogger"


def monitors():
    return [
        GradientNormLogger(every_n_steps=1),
        AttentionEntropyMonitor(every_n_steps=1),
        DeadNeuronDetector(every_n_steps=1, window_tokens=1),
    ]


def heard(key, points):
    made = Heard()
    for step, value in points:
        made.keep(step, {key: value})
    return made.series()[key]


def test_a_heat_map_has_a_row_for_each_layer_and_a_hole_where_nothing_was_measured_yet():
    series = {
        "grad_norm/encoder_block_10": [(0, 1.0), (10, 2.0), (20, 4.0)],
        "grad_norm/encoder_block_9": [(10, 3.0), (20, 5.0)],
        "grad_norm/total": [(0, 9.0), (10, 9.0)],
        "grad_norm/attention_in": [(0, 9.0), (10, 9.0)],
        "dead_neurons/mlp": [(10, 0.5)],
    }
    (shown,) = heat_maps(series, {})  # of the units there is one step only
    assert (shown.key, shown.rows) == ("heat_maps/grad_norm", ["encoder_block_9", "encoder_block_10"])
    assert shown.columns == [0, 7, 14]
    np.testing.assert_array_equal(shown.values, [[np.nan, 3, 5], [1, 2, 4]])
    heads = {
        "attention_entropy/b_0_head_0": 0.25,
        "attention_entropy/b_0_head_1": 0.5,
        "attention_entropy/b_10_head_0": 1,
    }
    (shown,) = heat_maps({}, heads)
    assert (shown.rows, shown.columns) == (["b_0", "b_10"], [0, 1])
    np.testing.assert_array_equal(shown.values, [[0.25, 0.5], [1, np.nan]])


def test_a_heat_map_of_a_long_run_has_at_most_128_columns():
    points = [(step, 99.0 if step == 20_050 else 1.0) for step in range(0, 50_000, 50)]
    (shown,) = heat_maps({"grad_norm/layer_0": heard("grad_norm/layer_0", points)}, {})
    assert len(shown.columns) == 128
    assert shown.columns[0] == 0
    assert shown.columns[-1] > 49_000
    (at,) = np.flatnonzero(shown.values[0] > 1)
    assert shown.columns[at] <= 20_050 < shown.columns[at + 1]


def test_of_a_long_run_the_last_values_and_the_worst_of_those_before_are_known():
    generator = random.Random(0)
    steps = range(0, 100_000, 50)
    spike, sink, late = 30_050, 31_050, 95_000
    norm = [(step, 80.0 if step in (spike, late) else math.exp(generator.gauss(0, 0.1))) for step in steps]
    found = heard("grad_norm/layer_3", norm)
    assert [step for step, value in found if value > 50] == [spike, late]
    assert found[-200:] == norm[-200:]
    assert len(found) <= 128 + 200
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    entropy = [(step, 0.1 if step == sink else 0.8) for step in steps]
    assert (sink, 0.1) in heard("attention_entropy/a", entropy)
    loss = heard("val/loss", [(step, generator.gauss(2.0, 0.5)) for step in steps])
    assert sum(value for _, value in loss[:-200]) / len(loss[:-200]) == pytest.approx(2.0, abs=0.15), "not its peaks"


def test_the_layer_that_a_long_run_diverged_by_is_named():
    made, generator = Heard(), random.Random(0)
    for step in range(0, 100_000, 10):
        if step % 50 == 0:
            norms = {f"grad_norm/layer_{i}": math.exp(generator.gauss(0, 0.1)) for i in range(4)}
            if step >= 98_900:
                norms["grad_norm/layer_2"] *= 60
            made.keep(step, norms)
        made.keep(step, {"train/loss": (7.0 if step >= 98_950 else 2.0) + generator.gauss(0, 0.05)})
    found = diagnose(made.series(), [])
    assert (found.verdict, found.culprit, found.first_warning_step) == ("diverging", "layer_2", 98_900)


def test_what_is_heard_goes_on_from_a_checkpoint_as_if_never_interrupted():
    whole, half = Trace("high", most=16), Trace("high", most=16)
    for step in range(1000):
        whole.add(step, math.sin(step))
        half.add(step, math.sin(step))
        if step == 555:
            half = Trace(**json.loads(json.dumps(half.state_dict())))
    assert half.points == whole.points
    whole.cut(700)
    assert whole.points == [point for point in half.points if point[0] < 700]
    assert len(whole.points) > 8


def test_few_dead_units_do_not_look_like_many_nor_like_none():
    for share, highest in ((0.01, 0.1), (0.3, 0.3)):
        (shown,) = heat_maps({"dead_neurons/mlp": [(0, 0.0), (1, share)]}, {})
        assert shown.limits == (0.0, highest)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_any_values_can_be_drawn(value):
    for key in ("grad_norm/layer_0", "dead_neurons/mlp"):
        (shown,) = heat_maps({key: [(0, value), (1, value)]}, {})
        draw(shown).savefig("/dev/null", format="png")


def test_one_alert_of_a_kind_in_five_minutes():
    logger, skip = FakeWandb(), {"event": "skip", "text": "out of line"}
    trainer, alerts = SimpleNamespace(loggers=[logger]), Alerts(every_minutes=5.0)
    for step in range(3):
        alerts.raise_for(trainer, {"step": step, **skip})
    alerts.raise_for(trainer, {"step": 7, "event": "alarm", "alarm": "entropy_collapse", "where": ["a, head 0"]})
    alerts.raise_for(trainer, {"step": 8, "event": "look"})
    collapse = ("Attention entropy collapse", "step 7: a, head 0")
    assert logger.experiment.alerts == [("Loss spike: steps are skipped", "step 0: out of line"), collapse]
    often = Alerts(every_minutes=0.0)
    for step in range(3):
        often.raise_for(trainer, {"step": step, **skip})
    assert len(logger.experiment.alerts) == 5


def test_wandb_is_told_what_was_done_and_how_the_run_went(make_trainer, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "swordfish-swordfish")
    logger, dashboard = FakeWandb(), Dashboard(every_n_steps=8)
    trainer = make_trainer(max_steps=16, logger=logger, callbacks=[*monitors(), LossSpikeRecovery(), dashboard])
    faulty = loader(faults={20: "nan"})
    with pytest.warns(UserWarning, match="the gradient is not finite"):
        trainer.fit(TinyLM(), faulty, loader(n_samples=8))
    run = logger.experiment
    assert run.tags == ("mine", "single_device", "32-true")
    assert run.defined.items() >= {"val/loss": "min", "loss_spike/rollbacks": "max"}.items()
    assert [title for title, _ in run.alerts] == ["Loss spike: steps are skipped", "Gradient not finite"]
    assert {(key, step) for key, step in logger.images} == {(key, step) for key in HEAT_MAPS for step in (7, 15)}
    (table,) = logger.tables  # nothing new after step 7
    assert table[:2] == ("events/table", 7)
    assert [row[:2] for row in table[2]] == [[5, "skip"], [5, "gradient_not_finite"]]
    assert set(run.summary) == {
        f"health/{name}" for name in ("verdict", "culprit", "first_warning_step", "rollbacks", "steps_lost")
    }
    assert run.summary["health/verdict"] == dashboard.diagnosis.verdict == "recovered"
    dashboard.hear_event({"step": 1, "event": "alarm", "alarm": "x", "where": ["swordfish-swordfish"] * 20})
    assert dashboard.state_dict()["events"][-1]["where"] == ["<redacted: MY_TOKEN>"] * 8


def test_what_is_hidden_in_wandb_is_what_the_catalogue_has_for_each_layer_or_group():
    many, few = set(), set()
    for name in lit_callbacks.__all__:
        text = getattr(lit_callbacks, name).__doc__ or ""
        for key in re.findall(r"^ +(\w+/\S+): ", text, re.MULTILINE):
            (many if "<" in key else few).add(re.sub(r"<\w+>", "layer_0", key))
    assert len(many) > 15
    assert len(few) > 30
    assert {key for key in many | few if is_of_a_part(key)} == many
    assert not any(map(is_of_a_part, ("train/loss", "lr/decay", "heat_maps/grad_norm", "events/table")))


def test_each_layer_is_hidden_once_and_a_head_only_where_it_is_logged(make_trainer):
    def hidden(**options):
        logger = FakeWandb()
        callbacks = [AttentionEntropyMonitor(every_n_steps=1, **options), Dashboard()]
        make_trainer(max_steps=3, logger=logger, callbacks=callbacks).fit(TinyLM(), loader())
        logged = {key for _, metrics in logger.calls for key in metrics if key.startswith("attention")}
        assert sorted(logger.experiment.hidden) == sorted(logged - {"attention_entropy/min"})
        return {key for key in logged if "_head_" in key}

    assert not hidden()
    assert hidden(per_head=True)


def test_there_is_an_alert_of_a_rollback(make_trainer):
    logger, injector = FakeWandb(), FaultInjector([Fault("nan_weight", step=27)])
    recovery = LossSpikeRecovery(snapshot_every_n_steps=5, prove_steps=5)
    trainer = make_trainer(max_epochs=1, logger=logger, callbacks=[recovery, injector, Dashboard()])
    trainer.fit(TinyLM(), loader(n_samples=160))
    (alert,) = logger.experiment.alerts
    assert alert[0] == "Weights rolled back"
    assert "step 27: " in alert[1]
    assert logger.experiment.summary["health/rollbacks"] == 1
    assert logger.experiment.summary["health/steps_lost"] >= 1


def test_a_run_that_is_stopped_says_so_in_an_alert_and_in_the_verdict(make_trainer):
    logger, faults = FakeWandb(), dict.fromkeys(range(20, 64), "nan")
    trainer = make_trainer(max_steps=16, logger=logger, callbacks=[NonFiniteGuard(patience=2), Dashboard()])
    with pytest.raises(NonFiniteError):
        trainer.fit(TinyLM(), loader(faults=faults))
    assert [title for title, _ in logger.experiment.alerts] == ["Loss spike: steps are skipped", "Run stopped"]
    assert "Stopped at step 6 after 2 skipped steps in a row" in logger.experiment.alerts[1][1]
    assert logger.experiment.summary["health/first_warning_step"] == 5


def test_a_run_that_fails_raises_an_alert_and_shows_what_there_is(make_trainer):
    class Breaks(TinyLM):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("broken")
            return super().training_step(batch, batch_idx)

    logger = FakeWandb()
    with pytest.raises(KeyError):
        make_trainer(max_steps=9, logger=logger, callbacks=[*monitors(), Dashboard()]).fit(Breaks(), loader())
    assert logger.experiment.alerts == [("Run failed", "step 3: KeyError: 'broken'")]
    assert {key for key, _ in logger.images} == HEAT_MAPS
    assert logger.experiment.summary["health/verdict"]


def test_a_logger_that_fails_costs_one_warning(make_trainer):
    class Broken(FakeWandb):
        def log_image(self, key, images, step):
            raise ConnectionError("no network")

    Broken.__name__ = "WandbLogger"
    logger = Broken()
    trainer = make_trainer(max_steps=9, logger=logger, callbacks=[*monitors(), Dashboard(every_n_steps=2)])
    with pytest.warns(UserWarning, match="Dashboard could not show everything: ConnectionError: no network") as warned:
        trainer.fit(TinyLM(), loader())
    assert trainer.global_step == 9
    assert sum("Dashboard" in str(warning.message) for warning in warned) == 1
    assert logger.experiment.summary["health/verdict"], "the rest is shown all the same"


def test_tensorboard_gets_pictures_and_the_verdict_and_others_a_file(make_trainer, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = [CSVLogger(tmp_path, name="csv", version=""), TensorBoardLogger(tmp_path, name="board", version="")]
    make_trainer(max_steps=4, logger=loggers, callbacks=[*monitors(), Dashboard()]).fit(TinyLM(), loader())
    board = events.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert set(board.Tags()["images"]) == HEAT_MAPS
    assert {"grad_norm/total", "attention_entropy/min"} <= set(board.Tags()["scalars"])
    assert board.Tags()["tensors"] == ["health/verdict/text_summary"]
    assert [image.step for image in board.Images("heat_maps/grad_norm")] == [3]
    names = {path.name for path in (tmp_path / "csv" / "figures").iterdir()}
    assert names == {f"{key.replace('/', '_')}.png" for key in HEAT_MAPS}
    assert "grad_norm/total" in (tmp_path / "csv" / "metrics.csv").read_text()


def test_without_a_logger_the_pictures_are_in_the_run_folder(make_trainer, tmp_path):
    make_trainer(max_steps=4, callbacks=[*monitors(), Dashboard()]).fit(TinyLM(), loader())
    assert len(list((tmp_path / "figures").glob("heat_maps_*.png"))) == 3


def test_watching_changes_nothing(make_trainer):
    def run(callbacks):
        torch.manual_seed(0)
        module = TinyLM(dropout=0.1)
        trainer = make_trainer(max_steps=6, callbacks=callbacks)
        trainer.fit(module, loader(), loader(n_samples=8))
        return [*snapshot(module, trainer), torch.get_rng_state()]

    (*without, rng_without), (*watched, rng_watched) = run(monitors()), run([*monitors(), Dashboard(every_n_steps=1)])
    assert_identical(watched, without)
    assert torch.equal(rng_watched, rng_without)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resumed_run_shows_the_whole_and_nothing_twice(make_trainer, tmp_path):
    first = make_trainer(max_steps=6, callbacks=[*monitors(), Dashboard()])
    first.fit(TinyLM(), loader())
    first.save_checkpoint(tmp_path / "six.ckpt")
    dashboard = Dashboard()
    resumed = make_trainer(max_steps=9, callbacks=[*monitors(), dashboard])
    resumed.fit(TinyLM(), loader(), ckpt_path=tmp_path / "six.ckpt")
    assert steps_of(dashboard, "grad_norm/layer_1") == list(range(9))
    assert steps_of(dashboard, "train/loss") == list(range(9))
    dashboard.hear_event({"step": 0, "event": "alarm", "alarm": "of this run"})
    dashboard.hear_values(8, {"loss_spike/rollbacks": 3.0}, logged=True)
    again = make_trainer(max_steps=7, callbacks=[*monitors(), dashboard])
    again.fit(TinyLM(), loader())  # from the beginning
    assert steps_of(dashboard, "grad_norm/layer_1") == list(range(7))
    state = dashboard.state_dict()
    assert not state["events"]
    assert "loss_spike/rollbacks" not in state["last"], "of the run before"


def test_of_a_loss_that_nobody_has_seen_nothing_is_said(make_trainer):
    class PlainBackward(TwoOptimizers):
        def manual_backward(self, loss):
            loss.backward()

    dashboard = Dashboard()
    make_trainer(max_steps=8, callbacks=[dashboard]).fit(PlainBackward(), loader())
    assert "train/loss" not in dashboard.state_dict()["curves"]
    assert dashboard.diagnosis.verdict == "no data"


def test_a_monitor_that_wandb_cannot_summarise_costs_nothing(make_trainer):
    class Odd(Callback):
        monitor, mode = "val/loss_per_token", "auto"

    class Strict(FakeRun):
        def define_metric(self, key, step_metric, summary=None, hidden=False):
            assert summary in ("min", "max")
            if key == "val/perplexity":
                raise ConnectionError("no network")

    logger = FakeWandb()
    logger.experiment = Strict()
    with pytest.warns(UserWarning, match="Dashboard could not show everything: ConnectionError"):
        make_trainer(max_steps=2, logger=logger, callbacks=[Odd(), Dashboard()]).fit(TinyLM(), loader())
    assert logger.experiment.tags == ("mine", "single_device", "32-true"), "tags come first"


def steps_of(dashboard, key):
    return [step for step, _ in Trace(**dashboard.state_dict()["curves"][key]).points]


def test_events_have_a_place_and_a_text_in_the_table():
    rows = event_rows(
        [
            {"step": 3, "event": "skip", "parameter": "a.weight", "text": "not finite"},
            {"step": 4, "event": "autopsy", "where": "blocks.0", "text": "made a NaN"},
            {"step": 5, "event": "alarm", "alarm": "gradient_vanishing", "where": ["layer_0", "layer_1"]},
        ]
    )
    assert rows == [
        [3, "skip", "a.weight", "not finite"],
        [4, "autopsy", "blocks.0", "made a NaN"],
        [5, "gradient_vanishing", "layer_0, layer_1", ""],
    ]
