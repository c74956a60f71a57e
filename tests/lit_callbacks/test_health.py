"""The verdict on a run, from made-up numbers whose story is known."""

import math
import random

import pytest

from lit_callbacks.health import diagnose, explain
from lit_callbacks.health.series import course


def falling(n=200, every=1, noise=0.05, seed=0):
    """A loss that comes down from 5 to 2, with noise."""
    generator = random.Random(seed)
    return [(i * every, 2 + 3 * math.exp(-8 * i / n) + generator.gauss(0, noise)) for i in range(n)]


def skip(step, **more):
    return {"step": step, "event": "skip", "rule": "loss", "loss": 8.0, "grad_norm": 3.0, **more}


def test_a_falling_loss_is_healthy():
    found = diagnose({"train/loss": falling()}, [{"step": 0, "event": "recipe", "id": "no-warmup", "text": "x"}])
    assert (found.verdict, found.culprit, found.first_warning_step) == ("healthy", "", None)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.01, 0.1, 0.4])
def test_noise_is_no_divergence(seed, noise):
    assert diagnose({"train/loss": falling(noise=noise, seed=seed)}, []).verdict == "healthy"


def test_a_lone_spike_is_no_divergence():
    loss = falling()
    loss[150] = (150, 40.0)
    loss[151] = (151, math.nan)
    assert diagnose({"train/loss": loss}, []).verdict == "healthy"


def test_nothing_logged():
    assert diagnose({}, []).verdict == "no data"
    assert diagnose({"lr/decay": [(0, 1.0)]}, []).verdict == "no data"
    assert diagnose({"train/loss": []}, []).verdict == "no data"


def test_a_loss_that_rises_for_good_diverges_from_where_it_rose():
    loss = [*falling(), *((200 + i, 6.0) for i in range(60))]
    found = diagnose({"train_loss": loss}, [])
    assert (found.verdict, found.first_warning_step) == ("diverging", 200)
    assert "since step 200" in found.sentences[0]


def test_the_layer_that_went_first_is_the_culprit():
    loss = [*falling(), *((200 + i, 6.0) for i in range(60))]
    layers = {
        f"grad_norm/layer_{i}": [(step, 90.0 if step >= since else 1 + 0.1 * (step % 3)) for step in range(0, 260, 5)]
        for i, since in enumerate([200, 185, 195])
    }
    kinds = {"grad_norm/attention_in": [(step, 500.0 if step >= 180 else 1.0) for step in range(0, 260, 5)]}
    found = diagnose({"train/loss": loss, **layers, **kinds}, [])
    assert (found.verdict, found.culprit, found.first_warning_step) == ("diverging", "layer_1", 185)
    assert "Then in layer_2, layer_0" in found.sentences[1]


def test_of_layers_that_went_together_the_worst_is_the_culprit():
    loss = [*falling(), *((200 + i, 6.0) for i in range(60))]
    layers = {
        f"grad_norm/layer_{i}": [(step, high if step >= 150 else 1.0) for step in range(0, 260, 50)] * 1
        for i, high in enumerate([20.0, 70.0, 30.0])
    }
    long = {key: [(step, 1.0) for step in range(-250, 0, 50)] + points for key, points in layers.items()}
    assert diagnose({"train/loss": loss, **long}, []).culprit == "layer_1"


def test_an_alarm_of_attention_before_the_loss_rises():
    loss = [*falling(every=10), *((2000 + 10 * i, 6.0) for i in range(60))]
    where = ["blocks.2.attention, head 1"]
    alarm = {"step": 1800, "event": "alarm", "alarm": "entropy_collapse", "where": where}
    early = {"step": 20, "event": "alarm", "alarm": "gradient_exploding", "where": ["layer_0"]}
    found = diagnose({"train/loss": loss}, [early, alarm])
    assert (found.verdict, found.culprit, found.first_warning_step) == ("diverging", where[0], 1800)


def test_entropy_that_falls_with_large_logits_is_a_sign_and_without_is_not():
    loss = [*falling(), *((200 + i, 6.0) for i in range(60))]
    entropy = {"attention_entropy/l1": [(step, 0.9 if step < 190 else 0.1) for step in range(0, 260, 10)]}
    logits = {"attention_logit_max/l1": [(step, 60.0) for step in range(0, 260, 10)]}
    assert diagnose({"train/loss": loss, **entropy}, []).culprit == ""
    found = diagnose({"train/loss": loss, **entropy, **logits}, [])
    assert (found.culprit, found.first_warning_step) == ("l1", 190)


def test_a_loss_that_ends_as_nan_diverges():
    loss = [*falling(), *((200 + i, math.nan) for i in range(3))]
    assert diagnose({"train/loss": loss}, []).first_warning_step == 200
    assert diagnose({"train/loss": [(0, math.nan)]}, []).verdict == "diverging"


def test_skips_are_recoveries_counted_by_episode():
    events = [skip(100), skip(101), {**skip(102), "event": "rollback", "to_step": 90}, skip(150)]
    found = diagnose({"train/loss": falling()}, events)
    assert found.verdict == "recovered"
    assert "twice" in found.sentences[0]
    assert "it cost 13 steps" in " ".join(found.sentences)  # 90 to 101, of which two were skips, and 150


def test_an_accepted_level_is_where_the_loss_begins():
    loss = [*falling(), *((200 + i, 6.0 - i / 100) for i in range(100))]
    assert diagnose({"train/loss": loss}, []).verdict == "diverging"
    assert diagnose({"train/loss": loss}, [{**skip(203), "event": "accept"}]).verdict == "recovered"


def test_a_stop_is_final_unless_the_run_went_on():
    stop = {**skip(150), "event": "stop", "to_step": 120}
    assert diagnose({"train/loss": falling()[:150]}, [stop]).verdict == "stopped"
    assert diagnose({"train/loss": falling()}, [stop]).verdict == "recovered"


def test_a_guard_that_gave_up_has_stopped_the_run_whatever_its_patience():
    events = [skip(140 + i, in_a_row=i + 1, parameter="blocks.1.w", rule="non_finite_gradient") for i in range(10)]
    assert diagnose({"train/loss": falling()[:140]}, events).verdict == "recovered", "its patience was not at its end"
    for n in (3, 10):
        end = {**events[n - 1], "event": "stop"}
        found = diagnose({"train/loss": falling()[:140]}, [*events[:n], end])
        assert (found.verdict, found.culprit, found.first_warning_step) == ("stopped", "blocks.1.w", 140)
    assert "too many steps in a row could not be made" in str(explain(end))
    assert diagnose({}, [{"step": 0, "event": "stop"}]).verdict == "stopped", "at the first step, too"


def test_what_lay_ahead_of_a_resume_is_undone():
    stop, resume = {**skip(150), "event": "stop", "to_step": 120}, {"step": 120, "event": "resume"}
    assert diagnose({"train/loss": falling()[:151]}, [stop, resume]).verdict == "healthy"
    assert diagnose({"train/loss": falling()[:151]}, [resume, stop]).verdict == "stopped"
    assert diagnose({"train/loss": falling()[:151]}, [stop, {**resume, "step": 150}]).verdict == "recovered"


def test_of_a_loss_that_is_not_finite_the_autopsy_alone_names_the_place():
    bad = skip(100, rule="non_finite_loss", parameter="embedding.weight")
    alarm = {"step": 100, "event": "alarm", "alarm": "gradient_not_finite", "where": ["embedding.weight"]}
    assert diagnose({"train/loss": falling()}, [bad, alarm]).culprit == ""
    assert "embedding" not in str(explain(bad))
    autopsy = {"step": 100, "event": "autopsy", "phase": "forward", "where": "blocks.1", "text": "made by blocks.1"}
    assert diagnose({"train/loss": falling()}, [bad, alarm, autopsy]).culprit == "blocks.1"


def test_gradients_that_are_not_finite_name_a_layer_unless_all_are():
    loss = [*falling(), *((200 + i, math.nan) for i in range(3))]
    one = {f"grad_norm/layer_{i}": [(195, 1.0), (200, math.nan if i == 1 else 1.0)] for i in range(3)}
    every = {f"grad_norm/layer_{i}": [(195, 1.0), (200, math.nan)] for i in range(3)}
    assert diagnose({"train/loss": loss, **one}, []).culprit == "layer_1"
    assert diagnose({"train/loss": loss, **every}, []).culprit == ""
    autopsy = {"step": 200, "event": "autopsy", "phase": "forward", "where": "blocks.2", "text": "made by blocks.2"}
    assert diagnose({"train/loss": loss, **one}, [autopsy]).culprit == "blocks.2"


def test_not_learning():
    flat = [(step, 3.0 + 0.01 * (step % 7)) for step in range(200)]
    assert diagnose({"train/loss": flat}, []).verdict == "not learning"
    finding = {"step": 1000, "event": "recipe", "id": "not-learning", "text": "Nothing is learned."}
    found = diagnose({"train/loss": falling(every=10)}, [finding])
    assert (found.verdict, found.first_warning_step) == ("not learning", 1000)


def test_a_finding_that_nothing_is_learned_counts_until_the_loss_falls():
    late = [(10 * i, 5.0 + random.Random(i).gauss(0, 0.05) - 0.02 * max(0, i - 120)) for i in range(200)]
    finding = {"step": 1000, "event": "recipe", "id": "not-learning", "text": "Nothing is learned."}
    assert diagnose({"train/loss": late}, [finding]).verdict == "healthy"
    assert diagnose({"train/loss": late[:120]}, [finding]).verdict == "not learning"
    assert diagnose({"train/loss": late}, [{**finding, "step": 1990}]).verdict == "not learning"
    few = [(i, 4.0 - 0.05 * i) for i in range(10)]
    assert diagnose({"train/loss": few}, [{**finding, "step": 9}]).verdict == "not learning", "nothing came after it"


def test_a_plateau_after_an_accepted_level_is_no_lack_of_learning():
    generator = random.Random(0)
    loss = [*falling(), *((200 + i, 3.0 + generator.gauss(0, 0.02)) for i in range(150))]
    assert diagnose({"train/loss": loss}, [{**skip(203), "event": "accept"}]).verdict == "recovered"


def test_uniform_attention_counts_while_it_lasts():
    alarm = {"step": 600, "event": "alarm", "alarm": "attention_uniform", "where": ["l0"]}
    series = {"train/loss": falling(every=10), "attention_entropy/l0": [(600, 0.999), (1990, 0.995)]}
    assert diagnose(series, [alarm]).verdict == "not learning"
    assert diagnose({**series, "attention_entropy/l0": [(600, 0.999), (1990, 0.5)]}, [alarm]).verdict == "healthy"


def test_dead_units_and_unanswered_alarms_are_a_risk():
    dead = {"dead_neurons/l0": [(0, 0.1), (199, 0.4)], "dead_neurons/l1": [(0, 0.0), (100, 0.9), (199, 1.0)]}
    found = diagnose({"train/loss": falling(), **dead}, [])
    assert (found.verdict, found.culprit, found.first_warning_step) == ("at risk", "l1", 100)
    alarm = {"step": 100, "event": "alarm", "alarm": "entropy_collapse", "where": ["l0, head 1"]}
    assert diagnose({"train/loss": falling()}, [alarm]).culprit == "l0, head 1"
    assert diagnose({"train/loss": falling()}, [alarm, skip(120)]).verdict == "recovered"


def test_a_gradient_alarm_that_never_came_again_is_a_remark():
    alarm = {"step": 12, "event": "alarm", "alarm": "gradient_exploding", "where": ["layer_0"]}
    found = diagnose({"train/loss": falling()}, [alarm])
    assert found.verdict == "healthy"
    assert "Only once, at step 12, in layer_0: the gradient norm was far above" in found.sentences[1]
    assert "nothing was out of line" not in found.sentences[0]
    assert diagnose({"train/loss": falling()}, [alarm, {**alarm, "step": 90}]).verdict == "at risk"
    assert diagnose({"train/loss": falling()}, [{**alarm, "step": 190}]).verdict == "at risk"


def test_only_a_loss_of_a_known_name_is_judged():
    rising = [*falling(), *((200 + i, 6.0) for i in range(60))]
    for key in ("train_loss_epoch", "loss/train"):
        assert diagnose({key: rising, "aux_loss": falling(), "val_loss": falling()}, []).verdict == "diverging"
    for key in ("val_loss", "d_loss"):
        found = diagnose({key: rising}, [])
        assert found.verdict == "no data"
        assert found.sentences == ("No training loss was logged under a name that is known, such as train/loss.",)
    assert diagnose({"train/accuracy": [(0, 0.5)]}, []).sentences[0].startswith("No training loss was logged")


def test_a_high_level_that_ends_low_is_not_rising():
    # The last level is 5.5, and the last value is low: there is no step from which on it stays high.
    assert course([(i, value) for i, value in enumerate([1, 1, 1.1, 1, 1, 1, 1, 1, 10, 1])]).rises_from is None


def test_few_values_that_rise_are_not_healthy():
    diverged = list(enumerate([3, 2.5, 2.2, 2, 5, 9, 20, 30, 40]))
    found = diagnose({"train/loss": diverged}, [])
    assert (found.verdict, found.first_warning_step) == ("diverging", 4)
    assert diagnose({"train/loss": list(enumerate([2.0, 5.0, 9.0]))}, []).verdict == "at risk"
    assert diagnose({"train/loss": list(enumerate([2.0, 2.2, 1.9]))}, []).verdict == "healthy"


def test_a_loss_that_was_never_finite_has_no_level():
    (text, *_) = diagnose({"train/loss": [(i, math.nan) for i in range(30)]}, []).sentences
    assert text.startswith("Diverging since step 0: the loss had no level that was finite")
    (text, *_) = diagnose({"train/loss": [(0, math.inf), *falling()[1:]]}, []).sentences
    assert "inf" not in text
    last = [*falling(), *((200 + i, math.inf if i < 12 else 2.0) for i in range(18))]
    assert diagnose({"train/loss": last}, []).verdict == "at risk"


def test_the_rise_is_measured_against_noise():
    quiet = [(i, 2.0 + 0.001 * (i % 2)) for i in range(100)]
    assert course([*quiet, *((100 + i, 2.09) for i in range(40))]).rises_from is None  # less than 5 %
    assert course([*quiet, *((100 + i, 2.11) for i in range(40))]).rises_from == 100


def test_every_kind_of_event_is_a_sentence():
    kinds = {
        "skip": {"rule": "non_finite_loss"}, "rollback": {"to_step": 3}, "accept": {}, "stop": {"to_step": 2},
        "alarm": {"alarm": "entropy_collapse", "where": ["a", "b", "c"]}, "autopsy": {"text": "the batch"},
        "recipe": {"text": "No warm-up.", "fix": "Warm up."}, "look": {}, "jump": {"passed_over": 1},
        "shutdown": {"reason": "SIGTERM", "checkpoint": "a.ckpt"}, "resume": {}, "early_stop": {"best": 1.0},
        "not_saved": {"reason": "r"}, "save_failed": {"error": "e"}, "hang": {"seconds": 3},
        "unfreeze": {},
        "something_new": {"value": 7},
    }  # fmt: skip
    told = {kind: str(explain({"step": 9, "event": kind, **more})) for kind, more in kinds.items()}
    assert all(text.startswith("step 9: ") and text.endswith(".") and "None" not in text for text in told.values())
    assert told["alarm"].startswith("step 9: the attention entropy had collapsed, first seen in a and 2 more")
    assert "cost 6 steps" in told["rollback"]
    assert told["something_new"] == "step 9: something new: value 7."


def test_half_written_events_are_told_as_far_as_they_go():
    assert str(explain({"event": "skip"})).startswith("step 0: ")
    assert diagnose({"train/loss": falling()}, [{"event": "skip"}, {"step": "x", "event": "stop"}]).verdict == "healthy"
