"""The callbacks that every run should have."""

from lightning.pytorch import Callback

from lit_callbacks.activation_stats_monitor import ActivationStatsMonitor
from lit_callbacks.attention_entropy_monitor import AttentionEntropyMonitor
from lit_callbacks.dashboard import Dashboard
from lit_callbacks.dead_neuron_detector import DeadNeuronDetector
from lit_callbacks.exact_resume import ExactResume
from lit_callbacks.gradient_norm_logger import GradientNormLogger
from lit_callbacks.heartbeat import Heartbeat
from lit_callbacks.loss_curve import LossCurve
from lit_callbacks.loss_spike_recovery import LossSpikeRecovery
from lit_callbacks.non_finite_autopsy import NonFiniteAutopsy
from lit_callbacks.parameter_stats_logger import ParameterStatsLogger
from lit_callbacks.throughput_logger import ThroughputLogger


def recommended() -> list[Callback]:
    """New instances of the callbacks that every run should have, with their defaults.

    Example:
        >>> "LossSpikeRecovery" in [type(callback).__name__ for callback in recommended()]
        True
    """
    return [
        ThroughputLogger(),
        GradientNormLogger(),
        AttentionEntropyMonitor(),
        DeadNeuronDetector(),
        ActivationStatsMonitor(),
        ParameterStatsLogger(),
        LossCurve(),
        NonFiniteAutopsy(),
        LossSpikeRecovery(),
        ExactResume(),
        Heartbeat(),
        Dashboard(),
    ]
