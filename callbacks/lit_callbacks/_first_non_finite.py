"""Where does the first value that is not finite come from, in one forward pass and its backward pass?

Forward, hooks look at what goes into every module and at what comes out. Backward, hooks on the nodes of the graph do
so for every operation; the number that autograd gave a node tells during which module's call it was made.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import Node
from torchmetrics import Metric

from lit_callbacks._names import clean_name
from lit_callbacks._value_range import Range, floats, range_of

PHASES = ("parameter", "batch", "forward", "loss", "backward", "failed", "finite")

# The square of a larger gradient is infinite in fp32, and with it the norm.
LARGE = 1e19


class Finding(NamedTuple):
    """What was found in which phase (one of ``PHASES``, of which the last two say that nothing was), and where."""

    phase: str
    where: str
    text: str
    ranges: Mapping[str, Range] = {}
    at: int = 0
    parameter: str | None = None
    note: str = ""

    @property
    def time(self) -> tuple[int, int]:
        """When it happened, comparable between ranks."""
        return PHASES.index(self.phase), self.at

    @property
    def nothing(self) -> bool:
        """Whether nothing was found."""
        return self.phase in ("failed", "finite")

    def __str__(self) -> str:
        ranges = ", ".join(f"{name} in {values}" for name, values in self.ranges.items())
        return f"{self.text}{', with ' if ranges else ''}{ranges}. {self.note}".strip()


FINITE = Finding("finite", "", "all was finite the second time: suspect the hardware, or what is left to chance")


@dataclass
class _Call:
    """A module's call: the numbers of the nodes that were made meanwhile, and what went in."""

    name: str
    module: nn.Module | None = None
    caller: "_Call | None" = None
    inputs: Range | None = None
    first: int = 0
    end: float = math.inf


class _Event(NamedTuple):
    """A call began, with these inputs, or ended, with these outputs."""

    call: _Call
    ended: bool
    values: Range


class _Operation(NamedTuple):
    """An operation's turn in the backward pass."""

    name: str
    number: int
    incoming: Range | None
    outgoing: Range


class Search:
    """Watches one forward pass and its backward pass.

    Args:
        module: The module whose ``training_step`` runs.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._step = _Call(f"{type(module).__name__}.training_step")
        self._stack = [self._step]
        self._events: list[_Event] = []
        self._operations: list[_Operation] = []

    @property
    def running(self) -> str:
        """The module that is running, or was when an exception came."""
        return self._stack[-1].name

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Watch the forward pass that runs inside."""
        with ExitStack() as hooks:
            for name, module in self._module.named_modules():
                if isinstance(module, Metric):  # may well be NaN, and no loss depends on it
                    continue
                enter = partial(self._enter, clean_name(name) or type(module).__name__)
                hooks.callback(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = range_of(tensor for _, tensor in floats([args, kwargs]))
        self._stack.append(_Call(name, module, self._stack[-1], inputs, _get_sequence_nr()))
        if inputs:
            self._events.append(_Event(self._stack[-1], False, inputs))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # A module that raised, to a caller who went on, has not left.
        while (call := self._stack.pop()).module is not module:
            pass
        call.end = _get_sequence_nr()
        if values := range_of(tensor for _, tensor in floats(output)):
            self._events.append(_Event(call, True, values))

    def backward(self, loss: Tensor) -> None:
        """Watch the backward pass of a loss, and add its gradients to those of the module's parameters."""
        if loss.grad_fn is None:
            return
        reentrant = False
        for node in _graph(loss.grad_fn):
            # A hook must not hold its node: such a circle is never freed.
            node.register_hook(partial(self._operation, node.name(), node._sequence_nr()))
            reentrant |= node.name() == "CheckpointFunctionBackward"
        if reentrant:  # refuses the other way
            loss.backward()
            return
        # Unlike `backward()` it wakes neither DDP nor optimizers that step as soon as a gradient is there.
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _operation(self, name: str, number: int, outgoing: Any, incoming: Any) -> None:
        if values := range_of(tensor for _, tensor in floats(outgoing)):
            before = range_of(tensor for _, tensor in floats(incoming))
            self._operations.append(_Operation(name, number, before, values))

    def finding(self, batch: Any, loss: Tensor) -> Finding:
        """The first thing that was not finite among weights, batch, modules, loss and gradients."""
        seen = self._in_backward() if loss.isfinite().all() else self._in_forward()
        if seen is FINITE:  # then what else there may be did no harm
            return seen
        for name, parameter in self._module.named_parameters():
            values = range_of([parameter])
            if values and (values.broken or (values.nonfinite and parameter.requires_grad)):
                name = clean_name(name)
                text = f"{name} was not finite before the forward pass"
                note = "An earlier step made it so: go back to a checkpoint from before."
                return Finding("parameter", name, text, {"values": values}, note=note)
        for place, tensor in floats(batch, "batch"):
            values = range_of([tensor])
            if values and values.broken:
                text, note = f"the batch is not finite at {place}", f"Beyond the batch, {seen.text}."
                return Finding("batch", place, text, {"values": values}, note=note)
            if values and values.nonfinite:
                seen = seen._replace(note=f"{seen.note} The batch holds -inf at {place}, as masks do.".strip())
        return seen

    def _in_forward(self) -> Finding:
        note = ""
        for at, (call, ended, values) in enumerate(self._events):
            if values.broken:
                # What goes into a module without having come out of one was made by their caller.
                source = call if ended or call.caller is None else call.caller
                text = f"the first non-finite value came out of {source.name} (forward)"
                text += "" if ended else f" before it called {call.name}"
                return Finding("forward", source.name, text, _ranges(source, values), at, note=note)
            if values.nonfinite and ended and not note:
                note = f"Before that, {call.name} put out -inf, as masks do."
        return Finding("loss", "loss", "the first non-finite value is the loss, from finite outputs", note=note)

    def _in_backward(self) -> Finding:
        broken = next((call.name for call, ended, values in self._events if ended and values.broken), None)
        named = ((name, p.grad) for name, p in self._module.named_parameters() if p.grad is not None)
        gradients = [(clean_name(name), values) for name, gradient in named if (values := range_of([gradient]))]
        parameter = next((name for name, values in gradients if values.nonfinite), None)
        note = f"The first parameter that got such a gradient is {parameter}." if parameter else ""
        if broken:
            note = f"Forward, {broken} had put out non-finite values that did not reach the loss. {note}"
        for at, (operation, number, incoming, outgoing) in enumerate(self._operations):
            if outgoing.nonfinite and not (incoming and incoming.nonfinite):
                calls = (call for call, ended, _ in self._events if ended and call.first <= number < call.end)
                call = max(calls, key=lambda call: call.first, default=self._step)
                text = f"the first non-finite value came out of {call.name} (backward, {operation})"
                ranges = {"gradient": incoming} if incoming else {}
                return Finding("backward", call.name, text, {**ranges, **_ranges(call)}, at, parameter, note)
        for name, values in gradients:
            if values.nonfinite or max(values.high, -values.low) > LARGE:
                text = f"the gradient of {name} overflowed where gradients are added up"
                return Finding("backward", name, text, {"values": values}, len(self._operations), parameter, note)
        return FINITE


def _graph(root: Node) -> set[Node]:
    found, waiting = {root}, [root]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in found and node.next_functions:
                found.add(node)
                waiting.append(node)
    return found


def _ranges(call: _Call, outputs: Range | None = None) -> dict[str, Range]:
    module = call.module or nn.Module()
    buffers = range_of(buffer for _, buffer in floats(list(module.buffers())))
    found = {
        "input": call.inputs,
        "weights": range_of(module.parameters()),
        "buffers": buffers if buffers and buffers.broken else None,
        "output": outputs,
    }
    return {name: values for name, values in found.items() if values}
