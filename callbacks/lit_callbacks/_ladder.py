"""What to do about a step: update, skip, roll back, accept a new level, or stop. No torch, no trainer, plain state."""

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from lit_callbacks.rules import SpikeRule, Verdict

Action = Literal["update", "skip", "rollback", "accept", "stop"]

AskWeights = Callable[[float, int], bool | None]
"""``ask(excess, before)``: are the weights healthy, in that they do not cost half of an excess of so many nats on the
batch that came after the newest snapshot of step ``before`` or an earlier one? None if that cannot be told."""

NOT_FINITE = "not finite"
_NON_FINITE = Verdict(anomalous=True, score=math.inf, reason=NOT_FINITE, excess=math.inf)
_ASK_AFTER = 3  # anomalies: the first two may be bad batches
_NON_FINITE_PATIENCE = 3  # NaN on three batches and frozen weights is not data, where nobody can look at the weights
_SAME_LEVEL = 0.1  # of the level that was rolled back from
_LOWER_FROM = 4  # the rollback from which on the learning rate is lowered
_OLDEST = -1  # a step before all snapshots
_LOOK_EVERY = 25  # steps between looks at the weights because of a suspicion


class Decision(NamedTuple):
    """What to do, and why.

    Args:
        action: What to do.
        verdict: What the rule thought.
        healthy: Whether the weights are, as far as is known.
        number: Of the rollback, counting those of the budget's window.
        before: The snapshot to go back to is the newest of that step or an earlier one.
        further: Snapshots to go further back.
        jump: Times the data seen since that snapshot to pass over besides.
    """

    action: Action
    verdict: Verdict
    healthy: bool | None = None
    number: int = 0
    before: int = 0
    further: int = 0
    jump: int = 0


@dataclass
class LadderState:
    """Everything the ladder remembers."""

    anomalies: int = 0
    """Of the present episode; each normal step takes two off."""
    nonfinite: int = 0
    """In a row."""
    first: int | None = None
    """Step of the episode's first anomaly."""
    pending: list[tuple[float, float]] = field(default_factory=list)
    """Rejected losses and gradient norms of the episode."""
    excesses: list[float] = field(default_factory=list)
    fresh: bool = False
    """Whether the weights are those of a snapshot, and no step has been made since."""
    blame_data: bool = False
    """Whether the episode's first anomaly came on fresh weights."""
    level: float = math.inf
    """Median of the losses that were rolled back from."""
    rollbacks: list[int] = field(default_factory=list)
    """Steps of the rollbacks in the budget's window."""
    lr_factor: float = 1.0
    lr_changed_at: int = 0
    next_look: int = 0


class Ladder:
    """Skips on one look, rolls back on persistence, and always has a way out.

    A step that the rule finds anomalous is skipped. When several are, and a batch from before shows that the weights
    are damaged, or when ``patience`` is over, the weights go back: to a proven snapshot; the next time passing over
    more data; then to older snapshots; then with a lower learning rate; and beyond ``max_rollbacks`` the run stops.
    When patience is over but the weights are healthy, or the very first batch on restored weights was anomalous as well
    and at the same level, then it is the data that has changed, and its level is accepted.

    Args:
        rule: Judges each step.
        patience: Anomalies before something must be done; each normal step takes two off.
        prove_steps: Steps between a snapshot and the first anomaly for the snapshot to be beyond suspicion.
        max_rollbacks: Rollbacks within ``budget_steps``.
        budget_steps: Steps after which a rollback is forgotten.
        cooldown_steps: Steps after which a lowered learning rate is doubled, until it is back.
    """

    def __init__(
        self,
        rule: SpikeRule,
        patience: int,
        prove_steps: int,
        max_rollbacks: int,
        budget_steps: int,
        cooldown_steps: int,
    ) -> None:
        self.rule = rule
        self.patience, self.prove_steps = patience, prove_steps
        self.max_rollbacks, self.budget_steps, self.cooldown_steps = max_rollbacks, budget_steps, cooldown_steps
        self.state = LadderState()

    @property
    def quiet(self) -> bool:
        """Whether no episode is open."""
        return self.state.anomalies == 0

    def decide(self, step: int, loss: float, grad_norm: float, ask: AskWeights) -> Decision:
        """Judge a step and say what to do. ``ask`` is called rarely, and for the same steps on all ranks."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        verdict = self.rule.judge(loss, grad_norm) if finite else _NON_FINITE
        if finite:
            self.rule.keep(loss, grad_norm, accepted=not verdict.anomalous)
        if not verdict.anomalous:
            return self._normal(step, verdict, ask)
        state = self.state
        if state.first is None:
            state.first, state.blame_data = step, state.fresh
        state.anomalies += 1
        state.nonfinite = 0 if finite else state.nonfinite + 1
        if finite:
            state.pending.append((loss, grad_norm))
        state.excesses.append(verdict.excess)
        return self._anomalous(step, verdict, ask)

    def _normal(self, step: int, verdict: Verdict, ask: AskWeights) -> Decision:
        state = self.state
        state.fresh, state.nonfinite, state.anomalies = False, 0, max(0, state.anomalies - 2)
        if self.quiet:
            self._close()
        if state.lr_factor < 1 and step - state.lr_changed_at >= self.cooldown_steps:
            state.lr_factor, state.lr_changed_at = min(1.0, 2 * state.lr_factor), step
        if verdict.suspicious and step >= state.next_look:
            state.next_look = step + _LOOK_EVERY
            healthy = ask(verdict.excess, _OLDEST)
            if healthy is not False:
                return Decision("update", verdict, healthy)
            decision = self.roll_back(step, verdict, damaged=True, oldest=True)
            self.rule.restart()  # the last losses it accepted were made by damaged weights
            return decision
        return Decision("update", verdict)

    def _anomalous(self, step: int, verdict: Verdict, ask: AskWeights) -> Decision:
        state = self.state
        over = state.anomalies >= self.patience
        healthy: bool | None = None
        if over or state.anomalies == _ASK_AFTER or state.nonfinite:
            # Weights that were rolled back to once, and are in trouble again, are asked about an older batch.
            before = _OLDEST if self._recent(step) else self._before(step)
            healthy = ask(statistics.median(state.excesses), before)
        if healthy is False:
            return self.roll_back(step, verdict, damaged=True)
        if not over and not (healthy is None and state.nonfinite >= _NON_FINITE_PATIENCE):
            return Decision("skip", verdict, healthy=healthy)
        same_level = state.blame_data and self._level() < state.level + _SAME_LEVEL * abs(state.level)
        if state.pending and state.nonfinite == 0 and (healthy or same_level):
            self.accept()
            return Decision("accept", verdict, healthy)
        return self.roll_back(step, verdict)

    def roll_back(self, step: int, verdict: Verdict, damaged: bool = False, oldest: bool = False) -> Decision:
        """Begin anew from a snapshot, or stop when the budget is spent."""
        state = self.state
        recent = self._recent(step)
        number = len(recent) + 1
        healthy = False if damaged else None
        before = _OLDEST if oldest else self._before(step)
        state.level = self._level()
        state.rollbacks = [*recent, step]
        self.rule.rewind()
        self._close()
        state.fresh = True
        if number > self.max_rollbacks:
            return Decision("stop", verdict, healthy, number, before=_OLDEST)
        if number >= _LOWER_FROM:
            state.lr_factor, state.lr_changed_at = state.lr_factor / 2, step
        further = max(0, number - 2)
        return Decision("rollback", verdict, healthy, number, before, further, jump=number - 1)

    def expect_shift(self) -> None:
        """Forget what is normal: it is about to change."""
        self.rule.restart()
        self._close()

    def _close(self) -> None:
        state = self.state
        state.anomalies = state.nonfinite = 0
        state.first, state.pending, state.excesses, state.blame_data = None, [], [], False

    def accept(self) -> None:
        """Take the level of the rejected steps for the new normal."""
        self.rule.restart(self.state.pending)
        self._close()

    def _before(self, step: int) -> int:
        return (step if self.state.first is None else self.state.first) - self.prove_steps

    def _level(self) -> float:
        return statistics.median(loss for loss, _ in self.state.pending) if self.state.pending else math.inf

    def _recent(self, step: int) -> list[int]:
        return [rollback for rollback in self.state.rollbacks if rollback > step - self.budget_steps]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain types."""
        return {"ladder": asdict(self.state), "rule": self.rule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Decide as the ladder that was saved."""
        self.state = LadderState(**copy.deepcopy(state["ladder"]))
        self.rule.load_state_dict(state["rule"])
