"""Floating-point operations of a forward pass, and what the device could do."""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule, Trainer

from lit_callbacks._intercept import Listener, interceptor_of

_SIZE, _REPEATS = 1024, 5


class FlopCount:
    """Counts the operations of matrix products, convolutions and attention from now until :meth:`stop`.

    It is torch's own counter, which counts attention in full also where it is causal, as PaLM's formula does.

    Example:
        >>> count = FlopCount()
        >>> _ = torch.zeros(2, 3) @ torch.zeros(3, 5)
        >>> count.stop()
        60
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode, flop_registry  # takes a while to import

        aten = torch.ops.aten
        formulas = dict(flop_registry)
        # The counter knows the attention kernels of GPUs only.
        formulas[aten._scaled_dot_product_flash_attention_for_cpu] = formulas[aten._scaled_dot_product_flash_attention]
        self._mode = FlopCounterMode(display=False, custom_mapping={op: _safe(f) for op, f in formulas.items()})
        self._mode.__enter__()

    def stop(self) -> int:
        """The number of operations."""
        self._mode.__exit__(None, None, None)
        return int(self._mode.get_total_flops())


class ForwardFlops(Listener):
    """Counts one forward pass of a fit; compiled modules run eagerly meanwhile, so that there is something to count."""

    def __init__(self) -> None:
        self.total = 0
        self.begun = self._open = False
        self._count: FlopCount | None = None

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first forward pass is about to begin."""
        self.begun = self._open = True
        interceptor_of(trainer).add(self, pl_module)
        self._count = FlopCount()

    def end(self, trainer: Trainer) -> None:
        """It is over, or never came."""
        if not self._open:
            return
        self._open = False
        if self._count is not None:
            self.total, self._count = self._count.stop(), None
        interceptor_of(trainer).remove(self)


def _safe(formula: Callable[..., int]) -> Callable[..., int]:
    # A formula that does not understand its arguments must not end somebody's forward pass.
    def count(*args: Any, **kwargs: Any) -> int:
        try:
            return formula(*args, **kwargs)
        except Exception:
            return 0

    count._get_raw = True  # type: ignore[attr-defined]  # the formulas of the registry take tensors
    return count


def compute_dtype(trainer: Trainer) -> torch.dtype:
    """The type that matrix products are computed in."""
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32


def peak_flops(device: torch.device, dtype: torch.dtype) -> int | None:
    """Operations per second of the data sheet, from Lightning's tables; None if the chip is not in them."""
    return get_available_flops(device, dtype) if device.type == "cuda" else None


def measured_gemm_rate(dtype: torch.dtype) -> float:
    """Operations per second of the best of five 1024³ matrix products on this CPU, with the threads it has now."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS + 1):  # the first one warms up
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * _SIZE**3 / best
