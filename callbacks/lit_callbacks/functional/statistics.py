"""Statistics of values that have been collected."""

import torch
from torch import Tensor


def centered_mean(values: Tensor, reach: int) -> Tensor:
    """Mean over ``reach`` neighbours on either side, for drawing a noisy curve.

    The window shrinks towards the start, where a loss falls steeply, and is cut off at the end; non-finite values are
    left out of it.

    Args:
        values: Shape ``(n,)``.
        reach: Neighbours on either side.

    Returns:
        Shape ``(n,)``, fp64; NaN where a window holds no finite value.

    Example:
        >>> centered_mean(torch.tensor([1.0, 2.0, 6.0, float("nan"), 4.0]), reach=1)
        tensor([1., 3., 4., 5., 4.], dtype=torch.float64)
    """
    finite = values.isfinite()
    zero = torch.zeros(1, dtype=torch.float64)
    sums = torch.cat([zero, values.double().where(finite, zero).cumsum(0)])
    counts = torch.cat([zero, finite.double().cumsum(0)])
    index = torch.arange(len(values))
    reaches = index.clamp(max=reach)
    low, high = index - reaches, (index + reaches + 1).clamp(max=len(values))
    return (sums[high] - sums[low]) / (counts[high] - counts[low])


def histogram_quantile(counts: Tensor, quantile: float) -> Tensor:
    """Quantile of values between 0 and 1 from their histogram, linear within a bin.

    Args:
        counts: Shape ``(..., bins)``, equally wide bins.
        quantile: Between 0 and 1.

    Returns:
        Shape ``(...,)``, off by at most the width of a bin; NaN where there are no values.

    Example:
        >>> histogram_quantile(torch.tensor([[0.0, 4.0], [2.0, 2.0]]), 0.25)
        tensor([0.6250, 0.2500])
    """
    # Not cumsum, which has no deterministic form on CUDA.
    up_to = torch.ones(counts.size(-1), counts.size(-1), device=counts.device).tril()
    cumulative = (counts.unsqueeze(-2) * up_to).sum(-1)
    target = quantile * cumulative[..., -1:]
    index = (cumulative < target).sum(-1, keepdim=True).clamp_(max=counts.size(-1) - 1)
    inside = counts.gather(-1, index)
    share = (target - cumulative.gather(-1, index) + inside) / inside
    return ((index + share) / counts.size(-1)).squeeze(-1)


def power_sums(x: Tensor) -> Tensor:
    r"""Number of elements and :math:`\sum x, \sum x^2, \sum x^3, \sum x^4`, which add up over batches and ranks.

    Args:
        x: Any shape and floating-point type.

    Returns:
        Shape ``(5,)``, fp32.

    Example:
        >>> power_sums(torch.tensor([1.0, 2.0]))
        tensor([ 2.,  3.,  5.,  9., 17.])
    """
    x = x.reshape(-1).float()
    square = x * x
    powers = [x.sum(), torch.dot(x, x), torch.dot(x, square), torch.dot(square, square)]
    return torch.stack([torch.full((), x.numel(), device=x.device, dtype=torch.float32), *powers])


def rms_and_kurtosis(sums: Tensor) -> tuple[Tensor, Tensor]:
    r"""Root mean square, and excess kurtosis :math:`E[(x-\mu)^4] / \sigma^4 - 3` (0 for a Gaussian).

    Args:
        sums: Shape ``(..., 5)``, of :func:`power_sums`.

    Returns:
        Two of shape ``(...,)``; the kurtosis of a constant is NaN.

    Example:
        >>> rms_and_kurtosis(power_sums(torch.tensor([-1.0, 1.0, -1.0, 1.0])))
        (tensor(1.), tensor(-2.))
    """
    m1, m2, m3, m4 = (sums[..., 1:] / sums[..., :1]).unbind(-1)
    variance = m2 - m1**2
    fourth = m4 - 4 * m3 * m1 + 6 * m2 * m1**2 - 3 * m1**4
    return m2.sqrt(), fourth / variance**2 - 3


def silent_units(activity: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    r"""Which units are dead, and which are dormant.

    A unit is *dead* if it was exactly zero on every token (Voita et al. 2023, *Neurons in Large Language Models: Dead,
    N-gram, Positional*), and :math:`\tau`-*dormant* if its mean activity is at most :math:`\tau` times that of its
    layer (Sokar et al., ICML 2023, *The Dormant Neuron Phenomenon in Deep Reinforcement Learning*).

    Args:
        activity: Shape ``(units,)``: the sum of :math:`|a|` over tokens.
        tau: Between 0 and 1.

    Returns:
        Two boolean tensors of shape ``(units,)``; dead units are dormant as well.

    Example:
        >>> silent_units(torch.tensor([0.0, 0.01, 1.0, 1.0]), tau=0.025)
        (tensor([ True, False, False, False]), tensor([ True,  True, False, False]))
    """
    return activity == 0, activity <= tau * activity.mean()
