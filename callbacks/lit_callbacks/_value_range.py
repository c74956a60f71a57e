"""Between what bounds do values lie, and are all of them finite?"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Range(NamedTuple):
    """The smallest and the largest of some values, NaN left out, and the share of them that is not finite.

    Example:
        >>> found = range_of([torch.tensor([1.0, torch.nan]), torch.tensor([-0.25, -torch.inf])])
        >>> print(found)
        [-inf, 1] (50 % not finite)
    """

    low: float
    high: float
    nonfinite: float
    nan: bool

    @property
    def broken(self) -> bool:
        """Whether something is wrong with them. Minus infinity alone is what masks are made of."""
        return self.nan or self.high == math.inf

    def __str__(self) -> str:
        share = f" ({100 * self.nonfinite:.3g} % not finite)" if self.nonfinite else ""
        return f"[{self.low:.3g}, {self.high:.3g}]{share}"


def range_of(tensors: Iterable[Tensor]) -> Range | None:
    """The range of all elements together; None if there are none. Read by the host at once."""
    low, high, bad, nans, count = math.inf, -math.inf, 0, 0, 0
    for tensor in tensors:
        values = _dense(tensor.detach())
        nan = values.isnan()
        bounds = values.masked_fill(nan, math.inf).amin(), values.masked_fill(nan, -math.inf).amax()
        low, high = min(low, bounds[0].item()), max(high, bounds[1].item())
        bad += int((~values.isfinite()).sum())
        nans += int(nan.sum())
        count += values.numel()
    if not count:
        return None
    return Range(*((low, high) if nans < count else (math.nan, math.nan)), bad / count, nans > 0)


def floats(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors in nested containers, each with its place.

    Example:
        >>> [place for place, _ in floats({"image": [torch.ones(2)], "label": torch.ones(2, dtype=int)}, "batch")]
        ["batch['image'][0]"]
    """
    if isinstance(value, Tensor):
        if value.is_floating_point() and _dense(value).numel():
            yield place, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from floats(part, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from floats(part, f"{place}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from floats(getattr(value, part.name), f"{place}.{part.name}")


def _dense(values: Tensor) -> Tensor:
    values = values.coalesce().values() if values.is_sparse else values
    return values if values.dtype == torch.float64 else values.float()
