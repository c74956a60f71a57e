"""The mathematics of the callbacks: tensors in, tensors out, and no reading of values back to the host."""

from lit_callbacks.functional.attention import (
    ENTROPY_BINS,
    AttentionStatistics,
    attention_statistics,
    softmax_statistics,
)
from lit_callbacks.functional.norms import tensor_norms, total_norm
from lit_callbacks.functional.statistics import (
    centered_mean,
    histogram_quantile,
    power_sums,
    rms_and_kurtosis,
    silent_units,
)

__all__ = [
    "ENTROPY_BINS",
    "AttentionStatistics",
    "attention_statistics",
    "centered_mean",
    "histogram_quantile",
    "power_sums",
    "rms_and_kurtosis",
    "silent_units",
    "softmax_statistics",
    "tensor_norms",
    "total_norm",
]
