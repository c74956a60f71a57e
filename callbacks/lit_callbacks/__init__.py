"""Callbacks that watch and protect transformer training, in any PyTorch Lightning project."""

from lit_callbacks._errors import SetupError
from lit_callbacks._events import EventLog
from lit_callbacks._recommended import recommended
from lit_callbacks._redaction import redacted
from lit_callbacks._step_skipper import DivergenceError
from lit_callbacks.activation_stats_monitor import ActivationStatsMonitor
from lit_callbacks.adaptive_gradient_clipping import AdaptiveGradientClipping
from lit_callbacks.attention_entropy_monitor import AttentionEntropyMonitor
from lit_callbacks.checkpointing import CheckpointError
from lit_callbacks.dashboard import Dashboard
from lit_callbacks.dead_neuron_detector import DeadNeuronDetector
from lit_callbacks.early_stopping_with_restore import EarlyStoppingWithRestore
from lit_callbacks.exact_resume import ExactResume
from lit_callbacks.graceful_shutdown import GracefulExit, GracefulShutdown
from lit_callbacks.gradient_norm_logger import GradientNormLogger
from lit_callbacks.gradual_unfreezing import GradualUnfreezing
from lit_callbacks.heartbeat import Heartbeat
from lit_callbacks.loss_curve import LossCurve
from lit_callbacks.loss_spike_recovery import LossSpikeRecovery
from lit_callbacks.non_finite_autopsy import NonFiniteAutopsy
from lit_callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
from lit_callbacks.parameter_stats_logger import ParameterStatsLogger
from lit_callbacks.recipe_check import RecipeCheck
from lit_callbacks.sequence_length_curriculum import SequenceLengthCurriculum
from lit_callbacks.shielding import shield
from lit_callbacks.throughput_logger import ThroughputLogger
from lit_callbacks.verified_checkpoint import VerifiedCheckpoint
from lit_callbacks.wandb_workspace import workspace

__all__ = [
    "ActivationStatsMonitor",
    "AdaptiveGradientClipping",
    "AttentionEntropyMonitor",
    "CheckpointError",
    "Dashboard",
    "DeadNeuronDetector",
    "DivergenceError",
    "EarlyStoppingWithRestore",
    "EventLog",
    "ExactResume",
    "GracefulExit",
    "GracefulShutdown",
    "GradientNormLogger",
    "GradualUnfreezing",
    "Heartbeat",
    "LossCurve",
    "LossSpikeRecovery",
    "NonFiniteAutopsy",
    "NonFiniteError",
    "NonFiniteGuard",
    "ParameterStatsLogger",
    "RecipeCheck",
    "SequenceLengthCurriculum",
    "SetupError",
    "ThroughputLogger",
    "VerifiedCheckpoint",
    "recommended",
    "redacted",
    "shield",
    "workspace",
]
