"""How did a run go? In plain words, from the numbers it logged and the events it wrote down."""

from lit_callbacks.health.diagnosis import Diagnosis, diagnose
from lit_callbacks.health.events import without_undone
from lit_callbacks.health.remarks import Remark, explain
from lit_callbacks.health.series import Points, Series, loss_key

__all__ = ["Diagnosis", "Points", "Remark", "Series", "diagnose", "explain", "loss_key", "without_undone"]
