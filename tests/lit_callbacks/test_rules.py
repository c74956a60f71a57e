import math
import random

import pytest
import torch

from lit_callbacks.rules import BestLossRatio, RobustRule, SixSigma, SpikeRule, Verdict, ZScore

RULES = [BestLossRatio, RobustRule, SixSigma, ZScore]


def healthy(n, seed=0, level=2.0, noise=0.1):
    """Losses and gradient norms of a run that does well."""
    generator = random.Random(seed)
    return [(level + generator.gauss(0, noise), math.exp(generator.gauss(0, 0.3))) for _ in range(n)]


def fed(rule, values):
    for loss, norm in values:
        rule.keep(loss, norm, accepted=True)
    return rule


def test_robust_by_hand():
    # Median 2.0, MAD 0.1: one unit of z is 0.14826. ln g: median 0, MAD 0, so the floor of 0.1.
    rule = fed(RobustRule(), [(2.0 + 0.1 * (i % 3 - 1), 1.0) for i in range(39)])
    unit = 1.4826 * 0.1
    assert not rule.judge(2.0 + 5.9 * unit, 1.0).anomalous
    loss = rule.judge(2.0 + 6.1 * unit, 1.0)
    assert (loss.reason, loss.score, loss.excess) == ("loss", pytest.approx(6.1), pytest.approx(6.1 * unit))
    assert rule.judge(2.0, math.exp(1.19)).reason == ""
    assert rule.judge(2.0, math.exp(1.21)).reason == "gradient norm"
    assert rule.judge(2.0 + 4.1 * unit, math.exp(0.41)).reason == "loss and gradient norm"
    assert rule.judge(2.0 + 4.1 * unit, math.exp(0.39)).reason == ""
    low = rule.judge(2.0 - 6.1 * unit, 1.0)
    assert not low.anomalous
    assert low.suspicious
    assert low.excess == pytest.approx(6 * unit)


def test_robust_speaks_at_the_third_high_loss_in_five():
    rule = fed(RobustRule(), [(2.0 + 0.1 * (i % 3 - 1), 1.0) for i in range(39)])
    high, normal = 2.0 + 3.5 * 1.4826 * 0.1, 2.0
    verdicts = []
    for loss in (high, normal, high, normal, high, normal, normal, high):
        verdicts.append(rule.judge(loss, 1.0).reason)
        rule.keep(loss, 1.0, accepted=not verdicts[-1])
    assert verdicts == ["", "", "", "", "loss, often", "", "", ""]


def test_robust_judges_nothing_before_it_has_seen_enough():
    rule = fed(RobustRule(), healthy(19))
    assert not rule.judge(100.0, 100.0).anomalous
    assert fed(rule, healthy(1)).judge(100.0, 100.0).anomalous


def test_robust_keeps_rejected_values_out():
    rule = fed(RobustRule(), healthy(40))
    before = rule.judge(6.0, 1.0)
    for _ in range(100):
        rule.keep(6.0, 1.0, accepted=False)
    assert rule.judge(6.0, 1.0).score == before.score


def test_robust_suspects_a_slow_rise_and_no_healthy_run():
    rule = fed(RobustRule(), healthy(200))
    assert not any(rule.judge(loss, norm).suspicious for loss, norm in healthy(200, seed=1))
    risen = 0.0
    for i, (loss, norm) in enumerate(healthy(200, seed=2)):
        rule.keep(loss + 0.004 * i, norm, accepted=True)
        verdict = rule.judge(loss + 0.004 * i, norm)
        if verdict.suspicious and verdict.reason == "loss has risen":
            risen = verdict.excess
            break
    assert 0.2 < risen < 0.5


def test_robust_on_a_healthy_descent_with_noise():
    """At most 1.5 false alarms in 1000, with the noise of small and of large batches."""
    for noise in (0.05, 0.2, 0.45):
        rule, anomalies, generator = RobustRule(), 0, random.Random(3)
        for step in range(3000):
            loss = 1.8 + 3 * math.exp(-step / 200) + generator.gauss(0, noise)
            norm = math.exp(generator.gauss(0, 0.25))
            verdict = rule.judge(loss, norm)
            anomalies += verdict.anomalous
            rule.keep(loss, norm, accepted=not verdict.anomalous)
        assert anomalies <= 4


def long_and_short(steps):
    """Every seventh batch is of long texts, which cost twice as much."""
    generator = random.Random(5)
    return [((4.0 if i % 7 == 3 else 2.0) + generator.gauss(0, 0.05), 1.0) for i in range(steps)]


def test_robust_takes_what_recurs_for_the_data():
    rule, anomalies = RobustRule(), []
    for i, (loss, norm) in enumerate(long_and_short(300)):
        verdict = rule.judge(loss, norm)
        if verdict.anomalous:
            anomalies.append(i)
        rule.keep(loss, norm, accepted=not verdict.anomalous)
    assert anomalies == [24, 31]  # the first two that are judged, of forty
    assert rule.judge(4.0, 1.0).score > 6
    assert not rule.judge(4.0, 1.0).anomalous
    assert rule.judge(5.0, 1.0).anomalous  # further out than they were
    assert rule.judge(4.0, 40.0).anomalous
    state = rule.state_dict()
    rule.rewind()
    assert rule.judge(4.0, 1.0).anomalous
    again = RobustRule()
    again.load_state_dict({name: value for name, value in state.items() if name not in ("outliers", "borne")})
    assert again.judge(4.0, 1.0).anomalous  # a state of before these were remembered


def test_robust_does_not_take_an_episode_for_the_data():
    rule = fed(RobustRule(), long_and_short(100))
    rule.rewind()
    for _ in range(30):
        verdict = rule.judge(4.0, 1.0)
        assert verdict.anomalous
        rule.keep(4.0, 1.0, accepted=False)


def test_robust_lets_losses_near_zero_have_a_long_tail():
    """Those of a classifier that is nearly always right: a hundred times the median is nothing unusual."""
    generator, rule, anomalies = random.Random(0), RobustRule(), 0
    for _ in range(3000):
        loss = math.exp(generator.gauss(-4, 1.5))
        verdict = rule.judge(loss, math.exp(generator.gauss(0, 0.3)))
        anomalies += verdict.anomalous
        rule.keep(loss, 1.0, accepted=not verdict.anomalous)
    assert anomalies < 15
    assert rule.judge(1000.0, 1.0).reason == "loss"


def test_robust_judges_no_loss_where_most_are_zero():
    rule = fed(RobustRule(), [(0.0, 0.0)] * 40)
    assert not rule.judge(0.5, 1e-6).anomalous
    assert not fed(rule, [(0.0, 0.0), (0.3, 1.0)] * 10).judge(0.5, 2.0).anomalous


def test_a_rule_of_ones_own_is_known_by_its_settings():
    class Mine(SpikeRule):
        def __init__(self, most):
            self.most, self._memory = most, {}

        def judge(self, loss, grad_norm):
            return Verdict(loss > self.most, loss)

        def keep(self, loss, grad_norm, accepted):
            pass

        def restart(self, values=()):
            pass

    assert repr(Mine(3.0)) == "Mine(most=3.0)"


def test_six_sigma_rejects_what_the_original_rejects():
    """OLMo-core at fa6c5014c rejects these steps of this trace (its optimizer class, run by itself in fp64)."""
    generator, rule, rejected = random.Random(7), SixSigma(), []
    for step in range(400):
        loss = 2 + 2 * math.exp(-step / 60) + generator.gauss(0, 0.1)
        norm = math.exp(generator.gauss(0, 0.3))
        loss += 1.0 if step in (70, 150, 151, 152, 200, 300) else 0.0
        norm *= 12 if step in (90, 250) else 1
        loss += 1.5 if step >= 350 else 0.0
        anomalous = rule.judge(loss, norm).anomalous
        rule.keep(loss, norm, accepted=not anomalous)
        if anomalous:
            rejected.append(step)
    assert rejected == [90, 250, 300, 350, 351, 352]


def test_z_score_by_hand():
    rule = fed(ZScore(warmup_steps=2), [(2.0, 1.0), (2.0, 3.0)])  # mean 2, standard deviation 1
    assert not rule.judge(9.0, 4.4).anomalous
    verdict = rule.judge(9.0, 4.6)
    assert verdict.anomalous
    assert verdict.score == pytest.approx(2.6, abs=1e-4)


def test_best_loss_ratio():
    rule = fed(BestLossRatio(), [(3.0, 1.0), (2.0, 1.0), (4.0, 1.0)])
    rule.keep(0.5, 1.0, accepted=False)
    assert not rule.judge(20.0, 1.0).anomalous
    assert rule.judge(20.1, 1.0).anomalous
    assert not BestLossRatio().judge(1e9, 1.0).anomalous


@pytest.mark.parametrize("cls", RULES)
def test_judging_changes_nothing_and_the_state_is_plain(cls, tmp_path):
    rule = fed(cls(), healthy(100))
    before = repr(rule.state_dict())
    rule.judge(50.0, 50.0)
    assert repr(rule.state_dict()) == before
    torch.save(rule.state_dict(), tmp_path / "rule.pt")
    other = cls()
    other.load_state_dict(torch.load(tmp_path / "rule.pt", weights_only=True))
    for loss, norm in [*healthy(50, seed=1), (3.0, 1.0), (2.0, 5.0), (9.0, 9.0)]:
        assert other.judge(loss, norm) == rule.judge(loss, norm)
        rule.keep(loss, norm, accepted=True)
        other.keep(loss, norm, accepted=True)


@pytest.mark.parametrize("cls", RULES)
def test_a_new_level_is_normal_after_a_restart(cls):
    rule = fed(cls(), healthy(200))
    rule.restart(healthy(40, level=5.0))
    assert not any(rule.judge(loss, 1.0).anomalous for loss, _ in healthy(100, seed=5, level=5.0))
    rule.restart()
    assert not rule.judge(1000.0, 1000.0).anomalous


@pytest.mark.parametrize("cls", RULES)
def test_two_of_the_same_settings_have_one_name(cls):
    assert repr(fed(cls(), healthy(30))) == repr(cls())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RobustRule(window=1), "window must be at least 2, got 1"),
        (lambda: RobustRule(window=10), "least must be at most window = 10, got 20"),
        (lambda: RobustRule(k_loss=0.0), "k_loss must be above 0, got 0.0"),
        (lambda: SixSigma(window=1), "window must be at least 2, got 1"),
        (lambda: SixSigma(sigma=-1.0), "sigma must be above 0, got -1.0"),
        (lambda: BestLossRatio(threshold=1.0), "threshold must be above 1, got 1.0"),
        (lambda: ZScore(warmup_steps=1), "warmup_steps must be at least 2, got 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
