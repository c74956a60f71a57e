"""What the verdict says, and what it must not say: sentences that a reader has found to be false, or to say nothing."""

import math
import random

import pytest

from lit_callbacks.health import diagnose


def noisy(levels, noise=0.02, every=1):
    """Values around levels."""
    generator = random.Random(0)
    return [(i * every, level + generator.gauss(0, noise)) for i, level in enumerate(levels)]


def falling(n=200):
    return noisy([2 + 3 * math.exp(-8 * i / n) for i in range(n)])


def alarm(step, kind, *where):
    return {"step": step, "event": "alarm", "alarm": kind, "where": list(where)}


def recipe(id, severity, step=0):
    return {"step": step, "event": "recipe", "id": id, "severity": severity, "text": f"It has {id}.", "fix": "Mend it."}


def rollback(step, to_step):
    return {"step": step, "event": "rollback", "rule": "loss", "loss": 8.0, "to_step": to_step}


COLLAPSE = alarm(100, "entropy_collapse", "blocks.6, head 1")


# ---- the loss is asked first


def test_only_a_loss_that_falls_is_well_so_far():
    assert (
        "At risk: the loss is well so far, but there was an alarm"
        in diagnose({"loss": falling()}, [COLLAPSE]).sentences[0]
    )
    wild = [(10 * i, value) for i, value in enumerate([8.9, 4.1, 13, 10.2, 7, 15.2, 12.1, 9.5, 11.9, 11.7, 12.4])]
    found = diagnose({"loss": wild}, [COLLAPSE])
    assert (found.verdict, found.culprit) == ("at risk", "blocks.6, head 1")
    assert found.sentences[0].startswith(
        "At risk: loss went from 8.9 to 12.05, which is no clear trend, and there was an"
    )
    assert (
        diagnose({}, [COLLAPSE]).sentences[0].startswith("At risk: no training loss was logged, and there was an alarm")
    )


def test_doubt_of_the_loss_comes_before_alarms_which_are_told_behind_it():
    loss = [*falling(), *((200 + i, math.nan if i < 12 else 2.0) for i in range(18))]
    found = diagnose({"train/loss": loss}, [COLLAPSE])
    assert (found.verdict, found.culprit, found.first_warning_step) == ("at risk", "blocks.6, head 1", 100)
    assert "most of its last values are not finite" in found.sentences[0]
    assert "at step 100, in blocks.6, head 1, the attention entropy had collapsed" in found.sentences[1]
    assert diagnose({"train/loss": loss}, []).first_warning_step is None


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.1, 1.2, 9, 11, 20], "at risk"),
        ([1.1, 1.2, 9, 20, 11], "at risk"),
        ([2, 2.1, 3, 4.5, 5, 8, 12, 9], "at risk"),
        ([1.1, 1.2, 0.9, 1.3, 1.4], "healthy"),
        ([1.1, 3, 1.0, 3.1, 2.5], "healthy"),
    ],
)
def test_a_rise_in_few_values_is_not_healthy(values, verdict):
    found = diagnose({"train/loss": list(enumerate(values))}, [])
    assert found.verdict in (verdict, "diverging" if verdict == "at risk" else verdict), found
    if found.verdict == "at risk":
        assert "in too few values to say more" in found.sentences[0]


# ---- nothing is learned


def test_not_learning_names_what_was_seen_and_what_was_said_before():
    loss = noisy([4.16] * 200)
    events = [
        recipe("no-clipping", "warning"), recipe("post-ln-without-warmup", "error"), recipe("batch-norm", "note"),
        alarm(20, "gradient_vanishing", "layer_0", "layer_1"), alarm(40, "entropy_collapse", "blocks.6"),
    ]  # fmt: skip
    found = diagnose({"train/loss": loss}, events)
    assert (found.verdict, found.culprit, found.first_warning_step) == ("not learning", "layer_0", 0)
    assert found.sentences[1:3] == (
        "What was seen first: at step 20, in layer_0, the gradient had all but vanished. Then in blocks.6.",
        "Said before the first step: post-ln-without-warmup: It has post-ln-without-warmup; "
        "no-clipping: It has no-clipping.",
    )
    assert diagnose({"train/loss": loss}, events[3:]).first_warning_step == 20
    later = diagnose({"train/loss": loss}, [recipe("lr-zero", "error", step=150)])
    assert (later.culprit, later.first_warning_step, len(later.sentences)) == ("", None, 2)


# ---- a loss that is not finite


def not_finite(layers_at_60):
    """A loss that is NaN from step 60 on, and what was measured every ten steps; all is NaN afterwards."""
    loss = [*falling(60), *((60 + i, math.nan) for i in range(30))]
    keys = [f"attention_entropy/layers_{i}_attn" for i in (10, 8, 9, 11)]
    values = {key: [(step, 0.9) for step in range(0, 60, 10)] for key in keys}
    for key, value in zip(keys, layers_at_60, strict=True):
        values[key] += [(60, value), (70, math.nan)]
    norms = {f"grad_norm/layer_{i}": [(50, 1.0), (60, math.nan)] for i in range(3)}
    return {"train/loss": loss, **values, **norms}, [alarm(60, "gradient_not_finite", "pos", "layer_0")]


def test_the_first_layer_whose_forward_pass_is_not_finite_is_named():
    found = diagnose(*not_finite([math.nan, 0.9, 0.9, math.nan]))
    assert (found.verdict, found.culprit, found.first_warning_step) == ("diverging", "layers_10_attn", 60)
    assert "the attention entropy was not finite; that of layers_9_attn before it still was" in found.sentences[1]


def test_no_layer_is_named_where_all_came_together():
    series, events = not_finite([math.nan] * 4)
    found = diagnose(series, events)
    assert (found.verdict, found.culprit, found.first_warning_step) == ("diverging", "", 60)
    assert not any("pos" in text.replace("unplaced", "") for text in found.sentences)
    assert "add NonFiniteAutopsy" in found.sentences[-1]
    bare = diagnose({"train/loss": series["train/loss"]}, [])
    assert bare.culprit == ""
    assert "add NonFiniteAutopsy" in bare.sentences[-1]


def test_a_gradient_that_is_not_finite_names_its_layer_where_the_loss_is_finite():
    found = diagnose({"train/loss": falling()}, [alarm(195, "gradient_not_finite", "layer_2")])
    assert (found.verdict, found.culprit) == ("at risk", "layer_2")


# ---- what has passed


@pytest.mark.parametrize(("last", "verdict"), [(4.5e-10, "at risk"), (0.3, "healthy")])
def test_a_vanished_gradient_has_passed_when_it_has_come_back(last, verdict):
    norms = [(step, 1.0 if step < 50 else 4.5e-10 if step < 200 else last) for step in range(0, 400, 10)]
    series = {"train/loss": noisy([math.log(64)] * 40, every=10), "grad_norm/layer_0": norms}
    found = diagnose(series, [alarm(100, "gradient_vanishing", "layer_0")])
    assert found.verdict == verdict
    begin = "Only once, at" if last > 0.1 else "What was seen first: at"
    assert found.sentences[1].startswith(f"{begin} step 100, in layer_0")
    assert "clip" not in " ".join(found.sentences), "that makes a small gradient no larger"


def test_recovered_is_a_loss_that_has_come_back():
    calm = noisy([4.5, 4.4, 4.3, 4.3, 4.3, 4.3])
    events = [rollback(6, 4), rollback(40, 4)]
    high = [*calm, *zip(range(6, 16), [4.4, 30, 4.3, 26, 4.6, 28, 4.5, 25.4, 28, 25], strict=True)]
    found = diagnose({"train/loss": high}, events)
    assert (found.verdict, found.first_warning_step) == ("at risk", 6)
    assert found.sentences[0] == (
        "At risk: the loss ends at 25.4, and was 4.303 before step 6, where the first of 2 episodes began."
    )
    back = [*calm, *zip(range(6, 16), [4.4, 30, 4.3, 26, 4.6, 4.2, 4.5, 4.3, 4.2, 4.3], strict=True)]
    assert diagnose({"train/loss": back}, events).sentences[0] == "Recovered twice; the loss went on as before."
    unknown = "Recovered twice as far as events tell; no training loss was logged."
    assert diagnose({}, events).sentences[0] == unknown


def test_a_burst_that_is_over_does_not_hide_that_the_loss_has_come_back():
    loss = [(step, value + 4 * (179 <= step < 191)) for step, value in falling()]
    assert diagnose({"train/loss": loss}, [rollback(100, 90)]).verdict == "recovered"


# ---- what it cost


def test_a_step_that_is_lost_twice_is_counted_once():
    found = diagnose({"train/loss": falling(148)}, [rollback(120, 1), rollback(146, 1)])
    assert "it cost 145 steps." in " ".join(found.sentences)  # 1 to 145, and not 119 + 145
