"""Who calls attention and activations, in which module: one function mode, however many callbacks listen.

Nothing is patched and no module is touched. While it is open, every torch function passes through one
``TorchFunctionMode``, and forward hooks keep the stack of module names. Compiled modules run eagerly meanwhile, so that
there is something to see; the compiled code stays valid.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.overrides import TorchFunctionMode

from lit_callbacks._names import clean_name


class Call(NamedTuple):
    """A torch function was called: with what, what came out, and in which module (path without wrapper prefixes)."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    name: str
    module: nn.Module

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)


class Listener:
    """What an interceptor tells. Subclasses must not raise: they run inside somebody's forward pass."""

    def handlers(self) -> Mapping[Callable[..., Any], Callable[[Call], None]]:
        """What to do after a call of each torch function."""
        return {}

    def on_module(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A module has returned."""

    def on_end(self) -> None:
        """The forward pass is over: nothing more is told until the listener is added again."""


class Interceptor(TorchFunctionMode):
    """Open from the first listener to the last; tells all of them."""

    def __init__(self) -> None:
        super().__init__()
        self._listeners: list[Listener] = []
        self._handlers: dict[Callable[..., Any], list[Callable[[Call], None]]] = {}
        self._stack: list[tuple[str, nn.Module]] = []
        self._undo: list[Callable[[], Any]] = []

    def add(self, listener: Listener, pl_module: LightningModule) -> None:
        """Tell this listener too."""
        if listener not in self._listeners:
            self._listeners.append(listener)
            self._index()
        if not self._undo:
            self._open(pl_module)

    def remove(self, listener: Listener) -> None:
        """Tell this listener no more; the last one closes."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            self._index()
            listener.on_end()
        if not self._listeners:
            self._close()

    def _index(self) -> None:
        handlers = defaultdict(list)
        for listener in self._listeners:
            for function, handler in listener.handlers().items():
                handlers[function].append(handler)
        self._handlers = dict(handlers)

    def _open(self, pl_module: LightningModule) -> None:
        self._stack = [("", pl_module)]
        # Not torch's hooks for all modules at once: torch.compile warns of those.
        for name, module in pl_module.named_modules():
            enter = partial(self._enter, clean_name(name))
            self._undo.append(module.register_forward_pre_hook(enter, prepend=True).remove)
            self._undo.append(module.register_forward_hook(self._leave, always_call=True).remove)
        # Importing the compiler takes seconds; where nobody has, nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stance = torch.compiler.set_stance("force_eager")
            self._undo.append(lambda: stance.__exit__(None, None, None))
        mode = ExitStack()
        mode.enter_context(self)
        self._undo.append(mode.close)

    def _close(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._stack = []

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._stack.append((name, module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # After an exception torch may call this for a module that was never entered.
        if len(self._stack) > 1 and self._stack[-1][1] is module:
            name, _ = self._stack.pop()
            for listener in self._listeners:
                listener.on_module(name, module, args, output)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        for handler in self._handlers.get(func, ()):
            handler(Call(func, args, kwargs, output, *self._stack[-1]))
        return output


_INTERCEPTORS: WeakKeyDictionary[Trainer, Interceptor] = WeakKeyDictionary()


def interceptor_of(trainer: Trainer) -> Interceptor:
    """The one interceptor that all our callbacks on this trainer share."""
    interceptor = _INTERCEPTORS.get(trainer)
    if interceptor is None:
        interceptor = _INTERCEPTORS[trainer] = Interceptor()
    return interceptor
