import math
import random

import pytest

from lit_callbacks._ladder import Ladder
from lit_callbacks.rules import RobustRule


def ladder(**options):
    settings = {"patience": 12, "prove_steps": 10, "max_rollbacks": 5, "budget_steps": 500, "cooldown_steps": 100}
    return Ladder(RobustRule(), **{**settings, **options})


class Run:
    """Feeds a ladder; the loss is 2 with a little noise, plus what a test adds. `weights` answers its question."""

    def __init__(self, ladder, weights=lambda excess, before: None):
        self.ladder, self.weights = ladder, weights
        self.generator, self.step, self.asked, self.offset = random.Random(0), 0, [], 0.0

    def ask(self, excess, before):
        self.asked.append((self.step, excess, before))
        return self.weights(excess, before)

    def do(self, n, extra=0.0, norm=1.0):
        """Actions of the next `n` steps."""
        decisions = []
        for _ in range(n):
            loss = 2 + self.offset + self.generator.gauss(0, 0.1) + extra
            decisions.append(
                self.ladder.decide(self.step, loss, norm * math.exp(self.generator.gauss(0, 0.1)), self.ask)
            )
            self.step += 1
        return decisions


def actions(decisions):
    return [decision.action for decision in decisions]


def test_one_bad_batch_is_skipped_and_nothing_else_happens():
    run = Run(ladder())
    assert set(actions(run.do(100))) == {"update"}
    assert actions(run.do(1, extra=5.0)) == ["skip"]
    assert set(actions(run.do(100))) == {"update"}
    assert run.asked == []


def test_ten_bad_batches_on_healthy_weights_are_skipped():
    run = Run(ladder(), weights=lambda excess, before: True)
    run.do(100)
    assert actions(run.do(10, extra=3.0)) == ["skip"] * 10
    assert actions(run.do(20)) == ["update"] * 20
    assert [step for step, *_ in run.asked] == [102]
    assert run.asked[0][1] == pytest.approx(3, abs=0.3)
    assert run.asked[0][2] == 90  # ten steps before the first of them


def test_damaged_weights_go_back_at_the_third_anomaly():
    run = Run(ladder(), weights=lambda excess, before: False)
    run.do(100)
    decisions = run.do(3, extra=3.0)
    assert actions(decisions) == ["skip", "skip", "rollback"]
    assert (decisions[2].number, decisions[2].before, decisions[2].further, decisions[2].jump) == (1, 90, 0, 0)
    assert set(actions(run.do(50))) == {"update"}


def test_a_new_level_of_the_data_is_accepted_without_a_rollback():
    run = Run(ladder(), weights=lambda excess, before: True)
    run.do(100)
    assert actions(run.do(12, extra=1.5, norm=2.0)) == ["skip"] * 11 + ["accept"]
    assert set(actions(run.do(200, extra=1.5, norm=2.0))) == {"update"}


def test_without_a_look_at_the_weights_a_new_level_costs_one_rollback():
    run = Run(ladder())
    run.do(100)
    expected = ["skip"] * 11 + ["rollback"] + ["skip"] * 11 + ["accept"]
    assert actions(run.do(24, extra=1.5, norm=2.0)) == expected
    assert set(actions(run.do(200, extra=1.5, norm=2.0))) == {"update"}


def test_without_a_look_a_fault_that_comes_back_after_some_steps_is_never_accepted():
    run = Run(ladder())
    run.do(100)
    found = []
    for _ in range(7):
        found += [d for d in run.do(12, extra=3.0) if d.action not in ("skip", "update")]
        if found[-1].action == "stop":
            break
        run.do(8)  # restored weights are well at first
    assert actions(found) == ["rollback"] * 5 + ["stop"]
    assert [(d.number, d.further, d.jump) for d in found[:5]] == [(1, 0, 0), (2, 0, 1), (3, 1, 2), (4, 2, 3), (5, 3, 4)]


def test_the_learning_rate_is_lowered_from_the_fourth_rollback_on_and_comes_back():
    run, factors = Run(ladder(), weights=lambda excess, before: False), []
    run.do(100)
    for _ in range(5):
        run.do(3, extra=3.0)
        factors.append(run.ladder.state.lr_factor)
        run.do(8)
    assert factors == [1, 1, 1, 0.5, 0.25]
    run.do(100)
    assert run.ladder.state.lr_factor == 0.5
    run.do(100)
    assert run.ladder.state.lr_factor == 1


def test_the_budget_is_of_a_window():
    run = Run(ladder(max_rollbacks=1, budget_steps=50), weights=lambda excess, before: False)
    run.do(100)
    assert actions(run.do(3, extra=3.0))[-1] == "rollback"
    run.do(60)
    assert actions(run.do(3, extra=3.0))[-1] == "rollback"
    run.do(20)
    assert actions(run.do(3, extra=3.0))[-1] == "stop"


def test_not_finite_is_judged_from_step_zero_and_asks_at_once():
    run = Run(ladder(), weights=lambda excess, before: True)
    assert run.ladder.decide(0, math.nan, 1.0, run.ask).action == "skip"
    assert run.asked == [(0, math.inf, -10)]
    run = Run(ladder(), weights=lambda excess, before: False)
    assert run.ladder.decide(0, 2.0, math.inf, run.ask).action == "rollback"


def test_what_is_not_finite_three_times_is_not_data_where_nobody_can_look():
    run = Run(ladder())
    run.do(50)
    nan = [run.ladder.decide(run.step + i, math.nan, math.nan, run.ask).action for i in range(3)]
    assert nan == ["skip", "skip", "rollback"]


def test_many_bad_samples_on_healthy_weights_end_in_a_rollback_that_passes_over_more_each_time():
    run = Run(ladder(), weights=lambda excess, before: True)
    run.do(50)
    decisions = [run.ladder.decide(run.step + i, math.nan, math.nan, run.ask) for i in range(36)]
    assert actions(decisions) == (["skip"] * 11 + ["rollback"]) * 3
    assert [d.jump for d in decisions if d.action == "rollback"] == [0, 1, 2]


def test_a_slow_rise_goes_back_to_the_oldest_snapshot_if_it_is_the_weights():
    run = Run(ladder(), weights=lambda excess, before: False)
    run.do(200)
    found = []
    for i in range(200):
        found += [d for d in run.do(1, extra=0.004 * i) if d.action != "update"]
        if found:
            break
    assert found[0].action == "rollback"
    assert found[0].before == -1
    assert run.asked[-1][2] == -1
    assert actions(run.do(100)).count("update") >= 98


def test_the_same_level_is_the_same_for_negative_losses():
    run = Run(ladder())
    run.offset = -12.0
    run.do(100)
    expected = ["skip"] * 11 + ["rollback"] + ["skip"] * 11 + ["accept"]
    assert actions(run.do(24, extra=1.5, norm=2.0)) == expected


def test_an_announced_shift_costs_nothing():
    run = Run(ladder(), weights=lambda excess, before: False)
    run.do(100)
    run.ladder.expect_shift()
    assert set(actions(run.do(200, extra=2.0, norm=3.0))) == {"update"}


@pytest.mark.parametrize("cut", [1, 5, 11, 12, 13, 20, 23, 30])
def test_a_ladder_that_is_saved_in_the_middle_decides_as_the_other(cut):
    whole, part = Run(ladder()), Run(ladder())
    expected, before = [], []
    for run, into in ((whole, expected), (part, before)):
        run.do(100)
        into += run.do(cut, extra=1.5, norm=2.0)
    after = Run(ladder())
    after.ladder.load_state_dict(part.ladder.state_dict())
    after.step, after.generator = part.step, part.generator
    assert whole.do(40, extra=1.5, norm=2.0) == after.do(40, extra=1.5, norm=2.0)
    assert whole.ladder.state_dict() == after.ladder.state_dict()
