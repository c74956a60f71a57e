"""What can be made to go wrong in a rehearsal."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

Kind = Literal[
    "nan_loss", "inf_loss", "nan_gradient", "inf_gradient", "nan_activation", "nan_weight", "nan_optimizer_state",
    "bit_flip", "learning_rate", "shuffled_labels", "random_tokens", "constant_tokens", "exploding_batch", "data_error",
]  # fmt: skip

LOSS = ("nan_loss", "inf_loss")
GRADIENT = ("nan_gradient", "inf_gradient")
WEIGHT = ("nan_weight", "nan_optimizer_state", "bit_flip")
BATCH = ("shuffled_labels", "random_tokens", "constant_tokens", "exploding_batch")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when. It lasts for whole optimizer steps, with all their micro-batches.

    What each kind does:
        nan_loss, inf_loss: the loss that ``training_step`` returns is NaN or +inf, and the gradient no longer finite.
        nan_gradient, inf_gradient: one element of a parameter's gradient, as it leaves the step's first backward pass
            that reaches the parameter: before it is accumulated, averaged over ranks, unscaled and clipped.
        nan_activation: all that a module returns.
        nan_weight: one element of a parameter, before the step's first forward pass.
        bit_flip: the top exponent bit of one element of a parameter, at the same time: in fp32 bit 30, which makes a
            weight below 1 larger by 2**128; in bf16, fp16 and fp64 their own.
        nan_optimizer_state: the first element of each tensor that an optimizer keeps for a parameter, at the same time.
        learning_rate: times ``factor``, for the update alone: neither ``training_step`` nor schedules see it.
        shuffled_labels: what is under ``labels``, ``targets`` or ``y``, or is the last tensor of a tuple, is permuted
            over all positions that are not -100; if it is floating-point, over samples.
        random_tokens, constant_tokens: integer tensors of at least two dimensions are drawn anew from the range of
            their ids, or filled with one id; so are labels that are tokens. Negative ids, and what is named mask,
            position, segment or type, stay.
        exploding_batch: floating-point tensors but masks times ``factor``. If there are none, the output of the first
            module without children that runs and has parameters (an embedding, usually) instead.
        data_error: a sample of a dataset from :meth:`FaultInjector.wrap` raises :class:`InjectedDataError` when read.

    Args:
        kind: One of the above.
        step: The optimizer step it begins at, as ``trainer.global_step`` counts; not for ``data_error``.
        n_steps: How many steps it covers; for ``data_error``, how many readings of the sample fail.
        factor: For ``learning_rate`` and ``exploding_batch``.
        where: Glob over parameter names, or for ``nan_activation`` over module names, without wrapper prefixes. The
            first parameter that matches is struck, or the first such module to run; by default the matrix in the middle
            of the model, or the first module without children that runs, has parameters, and is in its second half.
        rank: The process it happens in; None for all.
        index: The sample, for ``data_error`` only.

    Raises:
        ValueError: If an argument is out of range, or given to a kind that does not use it.

    Example:
        >>> print(Fault("learning_rate", step=240, n_steps=3, factor=60.0))
        learning_rate at step 240 to 242
    """

    kind: Kind
    step: int | None = None
    _: KW_ONLY
    n_steps: int = 1
    factor: float = 100.0
    where: str | None = None
    rank: int | None = None
    index: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        used, unused = ("index", "step") if self.kind == "data_error" else ("step", "index")
        lowest = 1 if self.kind == "nan_optimizer_state" else 0  # before its first step an optimizer has none
        if (value := getattr(self, used)) is None or value < lowest:
            raise ValueError(f"{used} must be at least {lowest} for {self.kind}, got {value!r}")
        if (value := getattr(self, unused)) is not None:
            raise ValueError(f"{unused} must be None for {self.kind}, got {value!r}")
        if self.n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {self.n_steps!r}")
        if not math.isfinite(self.factor):
            raise ValueError(f"factor must be finite, got {self.factor!r}")
        if self.rank is not None and self.rank < 0:
            raise ValueError(f"rank must be at least 0, got {self.rank!r}")
        has_place = self.kind in (*GRADIENT, *WEIGHT, "nan_activation")
        if self.where is not None and not (self.where and has_place):
            raise ValueError(f"where must be {'a glob' if has_place else 'None'} for {self.kind}, got {self.where!r}")

    def __str__(self) -> str:
        at = f"sample {self.index}" if self.step is None else f"step {self.step}"
        to = f" to {self.step + self.n_steps - 1}" if self.step is not None and self.n_steps > 1 else ""
        return f"{self.kind} at {at}{to}{'' if self.rank is None else f' on rank {self.rank}'}"

    def covers(self, step: int) -> bool:
        """Whether it happens in this optimizer step."""
        return self.step is not None and self.step <= step < self.step + self.n_steps
