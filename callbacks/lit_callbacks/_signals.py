"""Signals as a request that somebody looks at when it suits, and as an order when they are sent twice."""

import contextlib
import faulthandler
import functools
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import util
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is unknown on Windows
_LAST_WORD = 2.0  # seconds that Python has to end by itself after the second signal
_TICK = 0.5  # seconds in which the thread sees that it is over
_OF_LOADERS = "torch.utils.data._utils.signal_handling"


class SignalWatch:
    """Notes the first signal, and lets the second one end the process.

    A Python handler runs between two bytecodes, never while a call into C hangs. So a thread of its own, woken up by
    the C handler through a file descriptor, ends the process when ``grace_seconds`` have passed since the first signal
    and :meth:`arrived` has not been called, or soon after the second.

    A signal often goes to a whole process group (Ctrl-C, torchrun, SLURM). Processes that are forked from this one by
    ``multiprocessing``, such as the workers of a loader, leave what to do to it, but for SIGTERM, which ends them; that
    torch then makes an error of their end is put off, for the step that is under way has its data.

    Args:
        grace_seconds: How long the process may take to come to a safe place after the first signal.
        exit_code: The exit code that a signal stands for.
        on_first: Called in the main thread when the first signal has come.
        on_second: Called in the main thread when the second one has; it raises.
        names: The signals; those that the system does not have are left out.
    """

    def __init__(
        self,
        grace_seconds: float,
        exit_code: Callable[[str], int],
        on_first: Callable[[str], None],
        on_second: Callable[[str], None],
        names: Sequence[str] = NAMES,
    ) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self._grace_seconds, self._exit_code = grace_seconds, exit_code
        self._on_first, self._on_second = on_first, on_second
        self._previous: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._over, self._arrived = threading.Event(), threading.Event()
        self._pid = os.getpid()
        self._watched = {int(getattr(signal, name)): name for name in names if hasattr(signal, name)}
        # Lightning starts the workers before the first hook in which the signals can be taken over.
        util.register_after_fork(self, SignalWatch._leave_to_parent)

    def install(self) -> None:
        """Take the signals over, also from others; outside the main thread, which may not, nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._watched:
            if signal.getsignal(number) != self._handle:
                self._previous[number] = signal.signal(number, self._handle)
        if self._sockets is None:
            self._start_thread()

    def arrived(self) -> None:
        """Nothing hangs: from here on the process ends in its own time, however long the saving takes."""
        if self.received is not None:
            self._arrived.set()

    def restore(self) -> None:
        """Give the signals back where they are still ours: Lightning may have given them back already."""
        self._over.set()
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)
        self._previous = {}
        if self._sockets is not None:
            if threading.current_thread() is threading.main_thread():
                current = signal.set_wakeup_fd(-1)
                if current != self._sockets[1].fileno():  # somebody has set another since
                    signal.set_wakeup_fd(current, warn_on_full_buffer=False)
            for end in self._sockets:
                end.close()
            self._sockets = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            if number == signal.SIGTERM:  # `terminate()` of a process that was forked from this one
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        name = self._watched[number]
        if self.received is None:
            self.received = name
            _put_off_errors_of_workers()
            self._on_first(name)
        else:
            self._on_second(name)

    def _leave_to_parent(self) -> None:
        for number in self._watched:
            if number != signal.SIGTERM:
                with contextlib.suppress(ValueError):
                    signal.signal(number, _nothing)

    def _start_thread(self) -> None:
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        if previous != -1:  # an event loop's, which needs it
            signal.set_wakeup_fd(previous, warn_on_full_buffer=False)
            reader.close()
            writer.close()
            return
        _forget_in_children()
        self._sockets, self._over = (reader, writer), threading.Event()
        threading.Thread(target=self._wait, args=(reader, self._over), name="signals", daemon=True).start()

    def _wait(self, reader: socket.socket, over: threading.Event) -> None:
        seen: list[str] = []
        deadline = math.inf
        while not over.is_set():
            left = deadline - time.monotonic()
            with contextlib.suppress(OSError, ValueError):
                if select.select([reader], [], [], min(max(left, 0.0), _TICK))[0]:  # also of other signals
                    seen += [self._watched[number] for number in reader.recv(64) if number in self._watched]
            if len(seen) > 1:
                self._end(seen[-1], over, _LAST_WORD)
                return
            if self._arrived.is_set():
                deadline = math.inf
            elif seen and deadline == math.inf:
                deadline = time.monotonic() + self._grace_seconds
            elif seen and time.monotonic() >= deadline:
                self._end(seen[0], over, 0.0)
                return

    def _end(self, name: str, over: threading.Event, wait: float) -> None:
        if over.wait(wait):
            return
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        os._exit(self._exit_code(name))


def _nothing(number: int, frame: FrameType | None) -> None:
    """Not SIG_IGN, which programs that are started from here would inherit."""


def _put_off_errors_of_workers() -> None:
    # Lightning gives this signal back with all others when it tears down.
    number = getattr(signal, "SIGCHLD", None)
    if number is not None and getattr(signal.getsignal(number), "__module__", None) == _OF_LOADERS:
        signal.signal(number, signal.SIG_DFL)


@functools.cache
def _forget_in_children() -> None:
    """Keep what a forked process receives out of the socket it has inherited."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_wakeup)


def _close_wakeup() -> None:
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
