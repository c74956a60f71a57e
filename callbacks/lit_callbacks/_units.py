"""Follows hidden units from the function that activates them to the layer they enter.

A hidden unit is a coordinate of the last dimension of an activation: of ``relu(up(x))``, or of the product
``silu(gate(x)) * up(x)`` where there is a gate. Tensors that may become or that hold units are remembered by identity;
dropout, reshapes and the like pass that on, until a linear layer takes the units as its input.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_callbacks._intercept import Call

_LINEAR = (F.linear, torch.addmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_ACTIVATIONS = (
    F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.leaky_relu, F.gelu, F.silu, F.mish,
    F.elu, F.selu, F.celu, F.hardswish, F.softplus, F.glu,
)  # fmt: skip
_PRODUCTS = (torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__)
_POWERS = (torch.square, Tensor.square, torch.pow, Tensor.pow, Tensor.__pow__)
_PASSED_ON = (
    F.dropout, torch.dropout, Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.to,
    Tensor.type_as, Tensor.contiguous, Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.unbind,
    torch.unbind, Tensor.__getitem__,
)  # fmt: skip


WRITTEN_OUT = "transformers.activations"
"""Hugging Face writes some activations out in elementary functions; their modules are told by where they come from."""


class Rows(NamedTuple):
    """The weight matrix that made a tensor, and the dimension along which the input of a unit lies."""

    weight: Tensor
    dim: int


class Units(NamedTuple):
    """Hidden units: their values ``(..., units)``, the matrices that made them, and the module that activated them."""

    values: Tensor
    rows: tuple[Rows, ...]
    where: str


class UnitFollower:
    """Calls ``found(name, units)`` for all units of a forward pass; ``name`` is the layer that the units enter.

    Units that enter no linear layer, such as those before a norm, are named after the module that activated them, and
    found when :meth:`finish` is called. Units that no matrix has made and none takes, as in convolutions, are not.
    """

    def __init__(self, found: Callable[[str, Units], None]) -> None:
        self._found = found
        # By identity: what a matrix has made, or units. A look-up by torch's weak dictionaries takes ten times as long.
        self._held: dict[int, tuple[ref[Tensor], tuple[Rows, ...] | Units]] = {}

    def handlers(self) -> dict[Callable[..., Any], Callable[[Call], None]]:
        """What to do after each function."""
        return {
            **dict.fromkeys(_LINEAR, self._linear),
            **dict.fromkeys(_ACTIVATIONS, self._activation),
            **dict.fromkeys(_PRODUCTS, self._product),
            **dict.fromkeys(_POWERS, self._power),
            **dict.fromkeys(_PASSED_ON, self._passed_on),
            Tensor.detach: self._detached,
        }

    def on_module(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """One of :data:`WRITTEN_OUT` has returned."""
        if isinstance(output, Tensor) and args:
            self._activate(args[0], output, name)

    def finish(self) -> None:
        """The forward pass is over."""
        for held in {id(held): held for _, held in self._held.values()}.values():
            if isinstance(held, Units) and held.rows:
                self._found(held.where, held)
        self._held.clear()

    def _of(self, x: Any) -> tuple[Rows, ...] | Units | None:
        entry = self._held.get(id(x))
        return entry[1] if entry is not None and entry[0]() is x else None

    def _hold(self, x: Tensor, held: tuple[Rows, ...] | Units) -> None:
        self._held[id(x)] = ref(x), held

    def _forget(self, units: Units) -> None:
        self._held = {key: entry for key, entry in self._held.items() if entry[1] is not units}

    def _linear(self, call: Call) -> None:
        if call.function is torch.addmm:
            x, weight, dim = call.argument(1, "mat1"), call.argument(2, "mat2"), 0
        elif call.function is F.linear:
            x, weight, dim = call.argument(0, "input"), call.argument(1, "weight"), 1
        else:
            x, weight, dim = call.args[0], call.argument(1, "other"), 0
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            return
        units = self._of(x)
        if isinstance(units, Units):
            self._forget(units)
            self._found(call.name, units)
        self._hold(call.output, (Rows(weight, dim),))

    def _activation(self, call: Call) -> None:
        self._activate(call.argument(0, "input"), call.output, call.name)

    def _activate(self, x: Tensor, output: Tensor, where: str) -> None:
        if isinstance(self._of(output), Units):  # a module that calls a function
            return
        made = self._of(x)
        self._hold(output, Units(output.detach(), made if made and not isinstance(made, Units) else (), where))

    def _product(self, call: Call) -> None:
        factors = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor)]
        units = [held for x in factors if isinstance(held := self._of(x), Units)]
        if units and isinstance(call.output, Tensor):
            made = [held for x in factors if (held := self._of(x)) and not isinstance(held, Units)]
            rows = (*(row for u in units for row in u.rows), *(row for m in made for row in m))
            for x in factors:
                self._held.pop(id(x), None)
            for u in units:
                self._forget(u)
            self._hold(call.output, Units(call.output.detach(), rows, units[0].where))

    def _power(self, call: Call) -> None:
        units = self._of(call.args[0])
        if isinstance(units, Units):
            self._forget(units)
            self._hold(call.output, units._replace(values=call.output.detach()))

    def _passed_on(self, call: Call) -> None:
        x = call.argument(0, "input")
        held = self._of(x)
        if held is None or call.output is x:
            return
        if not isinstance(held, Units):
            for output in _tensors(call.output):
                self._hold(output, held)
        elif isinstance(call.output, Tensor) and call.output.shape[-1:] == x.shape[-1:]:
            self._forget(held)
            self._hold(call.output, held)

    def _detached(self, call: Call) -> None:
        """The same tensor again: ZeRO-3 makes one of what enters a module, and of what leaves it."""
        held = self._of(call.args[0])
        if held is not None:
            self._hold(call.output, held)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        yield from (x for x in output if isinstance(x, Tensor))
