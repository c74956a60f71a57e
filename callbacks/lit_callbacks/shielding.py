"""What happens to training when a logger fails, or never comes back? Nothing."""

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lit_callbacks._events import say
from lit_callbacks._redaction import redacted

L = TypeVar("L")
_WAITING = 1000  # calls that may wait behind one that blocks
_GUARDED = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")
_LOST = "unlogged_metrics.jsonl"


def shield(logger: L, patience: float = 5.0) -> L:
    """The same logger, which from now on neither raises into training nor blocks it.

    What Lightning calls runs in a thread of the logger's own, one call after the other, and is waited for: a logger
    that works behaves as before. An exception in it is said once. When a call takes longer than ``patience``, training
    goes on, and later calls wait in a queue, without being waited for, until the logger is through. Metrics that it did
    not take are appended to ``unlogged_metrics.jsonl`` in its folder. Secrets of the environment are taken out of
    hyperparameters.

    It works in place, for loggers of ``lightning.pytorch`` and ``pytorch_lightning``; ``isinstance`` sees the class it
    was. Only for loggers that may be used from another thread than the one they were made in, as those of W&B,
    TensorBoard and CSV may.

    Args:
        logger: Any Lightning logger.
        patience: Seconds a call may take before training goes on without it.

    Raises:
        ValueError: If ``patience`` is not above 0.

    Cost: 20 to 50 µs a call.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> isinstance(shield(CSVLogger("logs")), CSVLogger)
        True
    """
    if not patience > 0:
        raise ValueError(f"patience must be above 0 seconds, got {patience}")
    if "_worker" in vars(logger):
        return logger
    vars(logger)["_worker"] = _Worker(type(logger).__name__, patience, logger)
    logger.__class__ = _shielded(type(logger))
    return logger


def _shielded(cls: type) -> type:
    """A subclass that hands calls to the worker."""
    body: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body |= {name: _guarded(cls, name) for name in _GUARDED if hasattr(cls, name)}
    if isinstance(experiment := getattr(cls, "experiment", None), property):
        body["experiment"] = property(lambda self: _experiment(self, experiment))
    body["__reduce_ex__"] = lambda self, protocol: (_rebuild, (cls, _state(self), self._worker.patience))
    return type(cls.__name__, (cls,), body)


def _guarded(cls: type, name: str) -> Callable[..., Any]:
    method = getattr(cls, name)

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._worker.is_current():
            return method(self, *args, **kwargs)
        if name == "log_hyperparams":
            args, kwargs = redacted(args), redacted(kwargs)
        return self._worker.call(name, lambda: method(self, *args, **kwargs), arguments=(args, kwargs))

    return guarded


def _experiment(self: Any, experiment: property) -> Any:
    """The logger's own; a dummy that takes everything where that fails, or takes too long."""
    from lightning.fabric.loggers.logger import _DummyExperiment

    assert experiment.fget is not None
    get = partial(experiment.fget, self)
    return get() if self._worker.is_current() else self._worker.call("experiment", get, otherwise=_DummyExperiment())


def _state(logger: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(logger).items() if key != "_worker"}


def _rebuild(cls: Any, state: dict[str, Any], patience: float) -> Any:
    logger = cls.__new__(cls)
    vars(logger).update(state)
    return shield(logger, patience)


class _Worker:
    """Runs the calls of one logger, one after the other."""

    def __init__(self, title: str, patience: float, logger: Any) -> None:
        self.title, self.patience, self.logger = title, patience, logger
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._is_blocked = False
        self._said: set[str] = set()

    def is_current(self) -> bool:
        """Whether this is the logger's own thread."""
        return threading.current_thread() is self._thread

    def call(self, name: str, act: Callable[[], Any], arguments: Any = ((), {}), otherwise: Any = None) -> Any:
        """Do something in the thread, and wait for it as long as is reasonable."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name=f"{self.title} (shielded)", daemon=True)
            self._thread.start()
        done = threading.Event()
        result: list[Any] = []

        def job() -> None:
            try:
                result.append(act())
            except BaseException as error:
                self._tell("failed", f"{name} raised {type(error).__name__}: {error}")
                self._keep(name, arguments)
            finally:
                self._is_blocked = False
                done.set()

        try:
            self._queue.put(job, block=name == "finalize", timeout=self.patience)
        except queue.Full:
            self._keep(name, arguments)
            return otherwise
        if (self._is_blocked and name != "finalize") or not done.wait(self.patience):
            self._is_blocked = not done.is_set()
            self._tell("blocks", f"{name} takes longer than {self.patience} s")
            return otherwise
        return result[0] if result else otherwise

    def _run(self) -> None:
        while True:
            self._queue.get()()

    def _tell(self, kind: str, what: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            say(
                f"The logger {self.title} {kind}: {what}. Training goes on; what it does not take is in {self._file()}."
            )

    def _keep(self, name: str, arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> None:
        if name != "log_metrics":
            return
        args, kwargs = arguments
        metrics = kwargs.get("metrics", args[0] if args else {})
        step = kwargs.get("step", args[1] if len(args) > 1 else None)
        numbers = {key: str(float(value)) for key, value in metrics.items() if hasattr(value, "__float__")}  # no media
        line = json.dumps({"step": step, "metrics": numbers})
        with contextlib.suppress(OSError):
            self._file().parent.mkdir(parents=True, exist_ok=True)
            with self._file().open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _file(self) -> Path:
        with contextlib.suppress(Exception):
            return Path(self.logger.save_dir or ".") / _LOST
        return Path(_LOST)
