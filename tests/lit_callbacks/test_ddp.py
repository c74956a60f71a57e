import json
from pathlib import Path

import pytest
import torch

import helpers
from helpers import MemoryLogger, TinyLM, loader
from lit_callbacks import (
    ActivationStatsMonitor,
    AdaptiveGradientClipping,
    AttentionEntropyMonitor,
    DeadNeuronDetector,
    GradientNormLogger,
    LossCurve,
    NonFiniteGuard,
    ParameterStatsLogger,
)

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found, and the folder their runs lie in."""
    out = tmp_path_factory.mktemp("ddp")
    return helpers.two_ranks(WORKER, out, "rank"), out


@pytest.mark.parametrize("accumulate", [1, 4])
def test_norm_and_loss_are_those_of_one_process_with_the_same_global_batch(ranks, accumulate):
    (rank_0, _), _ = ranks
    torch.manual_seed(0)
    logger, curve = MemoryLogger(), LossCurve(every_n_steps=1)
    trainer = helpers.make_trainer(
        callbacks=[GradientNormLogger(every_n_steps=1), curve], logger=logger, max_epochs=1,
        accumulate_grad_batches=accumulate, default_root_dir=ranks[1] / "single",
    )  # fmt: skip
    trainer.fit(TinyLM(), loader(batch_size=8))
    found = rank_0[f"norm_{accumulate}"]
    expected = list(logger.values("grad_norm/total").values())
    assert len(expected) == 8 // accumulate
    assert [metrics["grad_norm/total"] for _, metrics in found["logged"]] == pytest.approx(expected, rel=1e-5)
    assert found["curve"] == pytest.approx(curve.train.values, rel=1e-5)


def test_a_bad_value_on_one_rank_is_skipped_on_all(ranks):
    (rank_0, rank_1), out = ranks
    assert rank_0["nan"]["state"] == rank_1["nan"]["state"] == {"nonfinite": 2, "skipped_steps": 2, "in_a_row": 0}
    assert rank_0["nan"]["steps"] == rank_1["nan"]["steps"] == 8
    assert rank_0["nan"]["weights"] == rank_1["nan"]["weights"]
    assert abs(rank_0["nan"]["weights"]) < 1e6

    loss, gradient = [json.loads(line) for line in (out / "nan/events.jsonl").read_text().splitlines()]
    assert (loss["step"], loss["rule"], loss["loss"]) == (0, "non_finite_loss", "nan")
    assert (loss["first_bad_rank"], loss["sample_ids"]) == (1, [4, 5, 6, 7])
    assert (gradient["step"], gradient["rule"]) == (3, "non_finite_gradient")
    assert gradient["sample_ids"] == [24, 25, 26, 27, 28, 29, 30, 31]


def test_patience_ends_all_ranks_at_the_same_step(ranks):
    (rank_0, rank_1), _ = ranks
    assert "Stopped at step 4 after 2 skipped steps" in rank_0["patience"]["error"]
    assert rank_0["patience"]["error"] == rank_1["patience"]["error"]
    assert rank_0["patience"]["weights"] == rank_1["patience"]["weights"]
    assert abs(rank_0["patience"]["weights"]) < 1e6


def test_an_observer_that_raises_on_one_rank_is_off_on_all(ranks):
    (rank_0, rank_1), _ = ranks
    assert rank_0["failing"]["measured"] == rank_1["failing"]["measured"] == 2
    assert rank_0["failing"]["steps"] == rank_1["failing"]["steps"] == 8
    assert rank_0["failing"]["logged"] == [[0, {"value": 0.5}]]
    assert len(rank_0["failing"]["warned"]) == 1
    assert "failed on rank 1 with ZeroDivisionError: only here" in rank_0["failing"]["warned"][0]


def test_observers_measure_what_one_process_does_on_the_same_global_batch(ranks):
    (rank_0, rank_1), out = ranks
    torch.manual_seed(0)
    logger = MemoryLogger()
    observers = [
        AttentionEntropyMonitor(1, per_head=True), DeadNeuronDetector(1, window_tokens=1), ActivationStatsMonitor(1),
        ParameterStatsLogger(1),
    ]  # fmt: skip
    trainer = helpers.make_trainer(callbacks=observers, logger=logger, max_epochs=1, default_root_dir=out / "one")
    trainer.fit(TinyLM(), loader(batch_size=8))
    for rank in (rank_0, rank_1):
        found = {(step, key): value for step, values in rank["observers"]["logged"] for key, value in values.items()}
        expected = {(step, key): value for step, values in logger.calls for key, value in values.items()}
        assert len(found) > 100
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert rank_0["observers"]["weights"] == rank_0["plain"]["weights"], "observers change nothing"


def test_a_unit_is_dead_only_if_it_is_on_all_ranks(ranks):
    (rank_0, rank_1), _ = ranks
    for rank in (rank_0, rank_1):
        values = rank["complementary"]["logged"][0][1]
        assert values["dead_neurons/blocks_2_2"] == 1 / 8
        assert values["dead_neurons/window_tokens"] == 64
        assert values["weight_dead_neurons/blocks_2_2"] == pytest.approx(3 / 8)


def test_a_layer_that_only_one_rank_ran_is_measured_and_nobody_hangs(ranks):
    (rank_0, rank_1), _ = ranks
    assert rank_0["one_branch"]["steps"] == rank_1["one_branch"]["steps"] == 8
    assert rank_0["one_branch"]["logged"] == rank_1["one_branch"]["logged"]
    values = rank_0["one_branch"]["logged"][0][1]
    assert {"attention_entropy/blocks_0", "attention_entropy/blocks_1"} <= set(values)


def test_throughput_adds_up_over_ranks(ranks):
    (rank_0, rank_1), _ = ranks
    tokens = [values["throughput/total_tokens"] for _, values in rank_0["throughput"]["logged"]]
    assert tokens == [values["throughput/total_tokens"] for _, values in rank_1["throughput"]["logged"]]
    assert tokens == [2 * 2 * 8 * 9, 4 * 2 * 8 * 9]  # steps, micro-batches, samples on all ranks, tokens
    assert rank_0["throughput"]["logged"][0][1]["throughput/effective_batch_tokens"] == 2 * 8 * 9


def test_the_autopsy_names_the_rank_and_changes_nothing(ranks):
    (rank_0, rank_1), out = ranks
    assert rank_0["autopsy"]["steps"] == rank_1["autopsy"]["steps"] == 8
    for rank in (rank_0, rank_1):
        assert rank["autopsy"]["weights"] == rank["guarded"]["weights"] == rank_0["guarded"]["weights"]
    autopsy, skip = [json.loads(line) for line in (out / "autopsy/events.jsonl").read_text().splitlines()]
    assert (autopsy["event"], autopsy["step"], autopsy["rank"]) == ("autopsy", 2, 1)
    assert (autopsy["phase"], autopsy["where"]) == ("forward", "hidden")
    assert (skip["event"], skip["step"], skip["first_bad_rank"]) == ("skip", 2, 1)


def test_all_ranks_clip_alike_and_as_one_process_does(ranks):
    (rank_0, rank_1), out = ranks
    for key in ("state", "weights"):
        assert rank_0["clipping"][key] == rank_1["clipping"][key]
    assert abs(rank_0["clipping"]["weights"]) < 1e6
    torch.manual_seed(0)
    logger = MemoryLogger()
    clipping = AdaptiveGradientClipping(z_threshold=0.2, max_grad_norm=0.6, warmup_steps=2, every_n_steps=1)
    trainer = helpers.make_trainer(
        callbacks=[clipping, NonFiniteGuard()], logger=logger, max_epochs=1, default_root_dir=out / "one"
    )
    trainer.fit(TinyLM(), loader(batch_size=8, faults={30: "nan"}))
    logged = [v["grad_norm/clip_coefficient"] for _, v in rank_0["clipping"]["logged"] if "grad_norm/threshold" in v]
    assert len(logged) == 7
    assert logged == pytest.approx(list(logger.values("grad_norm/clip_coefficient").values()), rel=1e-4)
    for key in ("mean", "variance"):
        assert rank_0["clipping"]["state"][key] == pytest.approx(clipping.state_dict()[key], rel=1e-4)


def test_recovery_skips_and_rolls_back_on_all_ranks_when_one_is_bad(ranks):
    (rank_0, rank_1), out = ranks
    assert rank_0["recovery"]["history"] == rank_1["recovery"]["history"]
    assert [action for _, action in rank_0["recovery"]["history"]] == ["skip", "rollback", "skip"]
    assert rank_0["recovery"]["weights"] == rank_1["recovery"]["weights"]
    assert abs(rank_0["recovery"]["weights"]) < 1e6
    nan, weight, spike = [json.loads(line) for line in (out / "recovery/events.jsonl").read_text().splitlines()]
    assert (nan["step"], nan["rule"], nan["first_bad_rank"], nan["sample_ids"]) == (
        10, "non_finite_loss", 1, [84, 85, 86, 87],
    )  # fmt: skip
    assert (weight["step"], weight["to_step"]) == (27, 22)
    assert (spike["step"], spike["sample_ids"]) == (30, [240, 241, 242, 243, 244, 245, 246, 247])


def test_when_recovery_gives_up_all_ranks_stop_with_the_same_error(ranks):
    (rank_0, rank_1), out = ranks
    for rank in (rank_0, rank_1):
        assert [action for _, action in rank["stopped"]["history"]] == ["rollback", "rollback", "stop"]
        assert "Stopped at step 25" in rank["stopped"]["error"]
    assert rank_0["stopped"]["weights"] == rank_1["stopped"]["weights"]
    saved = torch.load(out / "stopped/last_good.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_rank_zero_alone_shows_what_all_have_measured(ranks):
    (rank_0, rank_1), out = ranks
    assert {"grad_norm/layer_0", "attention_entropy/blocks_0", "train/loss"} <= set(rank_0["dashboard"]["heard"])
    assert (rank_0["dashboard"]["judged"], rank_1["dashboard"]["judged"]) == (True, False)
    assert rank_1["dashboard"]["heard"] == []
    pictures = {path.name for path in (out / "dashboard" / "figures").iterdir()}
    assert pictures == {"heat_maps_attention_entropy.png", "heat_maps_grad_norm.png"}
    assert rank_0["dashboard"]["weights"] == rank_0["plain"]["weights"]


def test_the_loss_that_is_judged_is_the_mean_over_ranks_and_micro_batches(ranks):
    (rank_0, rank_1), _ = ranks
    mean = (1 + 2 + 5 + 6) / 4
    known = {str(step): mean if step < 10 else float("inf") for step in range(15)}
    assert rank_0["judged"] == known, "from the tenth step on one is bad on rank 1 alone"
    assert rank_1["judged"] == {}
