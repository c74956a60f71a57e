"""The default rule: robust z-scores over a short window."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lit_callbacks.rules._rule import SpikeRule, Verdict, require

_SD_OF_MAD = 1.4826  # the standard deviation of a normal distribution over its median absolute deviation
_LOSS_FLOOR = 0.01  # of the median: the noise of very large batches is below that
_NORM_FLOOR = 0.1  # of ln(gradient norm)
# Losses near zero have a long tail: what is far out in nats may be usual as a ratio. In logarithms a loss must be out
# of line as well, by two thirds as much; where losses are about the same size that asks for nothing more.
_LOG_FACTOR = 1.5
_RECENT = 5
_SHORT, _LONG = 20, 200  # steps that the slow eye compares
_SLOW_SHARE, _SLOW_ERRORS = 0.05, 8.0
_USUAL_AFTER = 2  # outliers in the last 200 steps, that make the next one usual
_USUAL_HIGHS = 0.05  # of these steps, which make three in five no wonder
_USUAL_LOSS, _USUAL_NORM = 1.1, 1.5  # times that of those, which it may reach


@dataclass
class RobustRule(SpikeRule):
    r"""Median and MAD of the last accepted losses, and of the logarithms of their gradient norms.

    With :math:`z = (x - \mathrm{median}) / \max(1.4826\,\mathrm{MAD}, \mathrm{floor})` for the loss, and the same for
    the logarithm of the gradient norm, a step is anomalous if the loss is above ``k_loss``, or the norm above
    ``k_norm``, or both above ``k_both``, or for the third time in five the loss is above ``k_often``. Rejected values
    never enter the window. Positive losses must be nearly as far out in logarithms: those of a classifier that makes
    few errors have a long tail. The constants were chosen on 42 000 healthy steps of 25 small language models and 166
    faulted continuations: 0.7 false alarms in 1000 shuffled steps.

    What recurs belongs to the data, as batches of long texts among many of short ones do. A step that is out of line,
    but not the third in five, is usual if two others were as far out in the last 200 steps, each followed by a normal
    one; and three in five are no wonder where more than one in twenty was above ``k_often``. A rollback ends that.

    A step is suspicious if the loss is as far *below* the window, or if the median of the last 20 losses has risen
    above its lowest of the last 200, by 5 % and by 8 standard errors: damage that comes slowly.

    Args:
        window: Accepted steps to compare with.
        least: Accepted steps before anything is judged.
        k_loss: For the loss alone.
        k_norm: For the gradient norm alone.
        k_both: For both together.
        k_often: For the loss, three times in five steps.

    Raises:
        ValueError: If ``window`` is below 2, ``least`` not in 2..window, or a threshold not above 0.

    State: at most ``window`` losses and norms, 200 medians and flags, and what was out of line in the last 200 steps.

    Cost: 60 microseconds a step.

    Example:
        >>> rule = RobustRule()
        >>> for step in range(40):
        ...     rule.keep(2.0 + 0.1 * (step % 5), 1.0, accepted=True)
        >>> rule.judge(2.3, 1.0).anomalous, rule.judge(4.0, 1.0).reason
        (False, 'loss')
    """

    window: int = 40
    least: int = 20
    k_loss: float = 6.0
    k_norm: float = 12.0
    k_both: float = 4.0
    k_often: float = 3.0

    def __post_init__(self) -> None:
        require("RobustRule", "window", self.window, 2)
        require("RobustRule", "least", self.least, 2)
        if self.least > self.window:
            raise ValueError(f"RobustRule: least must be at most window = {self.window}, got {self.least}")
        for name in ("k_loss", "k_norm", "k_both", "k_often"):
            require("RobustRule", name, getattr(self, name), 0, above=True)
        self.restart()

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Look, and change nothing."""
        losses = self._memory["losses"]
        if len(losses) < self.least:
            return Verdict(anomalous=False, score=0.0)
        middle, scale = _middle_and_scale(losses)
        scale = max(scale, _LOSS_FLOOR * abs(middle))
        if not scale:  # more than half of the losses are 0
            return Verdict(anomalous=False, score=0.0)
        z_loss = self._z_loss(loss)
        reason = self._reason(z_loss, grad_norm)
        if reason and not self._is_usual(loss, grad_norm):
            return Verdict(True, z_loss, reason, max(loss - middle, self.k_often * scale))
        if z_loss < -self.k_loss:
            return Verdict(False, z_loss, "loss too low", self.k_loss * scale, suspicious=True)
        risen = self._risen(scale)
        return Verdict(False, z_loss, "loss has risen" if risen else "", risen, suspicious=risen > 0)

    def _reason(self, z_loss: float, grad_norm: float) -> str:
        """What is out of line; nothing, as a rule."""
        norms, z_norm = self._memory["norms"], 0.0
        if grad_norm > 0 and len(norms) >= self.least:
            log_middle, log_scale = _middle_and_scale(norms)
            z_norm = (math.log(grad_norm) - log_middle) / max(log_scale, _NORM_FLOOR)
        parts = {
            "loss": z_loss > self.k_loss,
            "gradient norm": z_norm > self.k_norm,
            "loss and gradient norm": min(z_loss, z_norm) > self.k_both,
            "loss, often": z_loss > self.k_often and self._is_often(),
        }
        return next((part for part, spoke in parts.items() if spoke), "")

    def _is_often(self) -> bool:
        """Whether one more is the third in five, and that is a wonder."""
        recent, borne = sum(self._memory["high"][1 - _RECENT :]), sum(self._memory["borne"])
        return bool(recent + 1 >= 3 and borne <= _USUAL_HIGHS * _LONG)

    def _is_usual(self, loss: float, grad_norm: float) -> bool:
        """Whether what is out of line has been so before, and normal steps came after."""
        alike = sum(
            over and loss <= _USUAL_LOSS * other and grad_norm <= _USUAL_NORM * norm
            for _, other, norm, over in self._memory["outliers"]
        )
        return alike >= _USUAL_AFTER and not self._is_often()

    def _z_loss(self, loss: float) -> float:
        losses = self._memory["losses"]
        middle, scale = _middle_and_scale(losses)
        z = (loss - middle) / (max(scale, _LOSS_FLOOR * abs(middle)) or math.inf)
        if z > 0 and min(losses) > 0:
            middle, scale = _middle_and_scale([math.log(value) for value in losses])
            z = min(z, _LOG_FACTOR * (math.log(loss) - middle) / max(scale, _LOSS_FLOOR))
        return z

    def keep(self, loss: float, grad_norm: float, accepted: bool) -> None:
        """Remember a step that was judged, and whether it was made."""
        memory = self._memory
        memory["outliers"] = [[age + 1, *rest] for age, *rest in memory["outliers"] if age < _LONG]
        if len(memory["losses"]) >= self.least:
            z_loss = self._z_loss(loss)
            high = z_loss > self.k_often
            memory["high"] = [*memory["high"], high][-_RECENT:]
            memory["borne"] = [*memory["borne"], high and accepted][-_LONG:]
            if not accepted or self._reason(z_loss, grad_norm):
                memory["outliers"].append([0, loss, grad_norm, False])
            else:
                memory["outliers"] = [[*outlier[:3], True] for outlier in memory["outliers"]]
        if accepted:
            self._learn(loss, grad_norm)
            if len(memory["losses"]) >= _SHORT:
                short = statistics.median(memory["losses"][-_SHORT:])
                memory["medians"] = [*memory["medians"], short][-_LONG:]

    def _learn(self, loss: float, grad_norm: float) -> None:
        self._memory["losses"] = [*self._memory["losses"], loss][-self.window :]
        if grad_norm > 0:
            self._memory["norms"] = [*self._memory["norms"], math.log(grad_norm)][-self.window :]

    def restart(self, values: Iterable[tuple[float, float]] = ()) -> None:
        """Forget everything: the level has changed, and these losses and gradient norms are the new normal."""
        self._memory = {"losses": [], "norms": [], "high": [], "medians": [], "outliers": [], "borne": []}
        for loss, grad_norm in values:
            self._learn(loss, grad_norm)

    def rewind(self) -> None:
        """The weights have gone back to an earlier step: forget how the last losses followed one another."""
        for name in ("high", "borne", "medians", "outliers"):
            self._memory[name] = []

    def _risen(self, scale: float) -> float:
        """Nats by which the loss has risen slowly, 0 if it has not."""
        medians = self._memory["medians"]
        if len(medians) < _LONG // 2:
            return 0.0
        lowest = min(medians)
        rise: float = medians[-1] - lowest
        error = 1.25 * scale / math.sqrt(_SHORT)  # of a median
        return rise if rise > max(_SLOW_SHARE * abs(lowest), _SLOW_ERRORS * error) else 0.0


def _middle_and_scale(values: Sequence[float]) -> tuple[float, float]:
    middle = statistics.median(values)
    return middle, _SD_OF_MAD * statistics.median(abs(value - middle) for value in values)
