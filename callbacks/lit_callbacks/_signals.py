"""Signals as a request that somebody looks at when it suits, and as an order when they are sent twice."""

import contextlib
import faulthandler
import functools
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # the last is unknown on Windows
_LAST_WORD = 2.0  # seconds that Python has to end by itself after the second signal


class SignalWatch:
    """Notes the first signal, and lets the second one end the process.

    A Python handler runs between two bytecodes, never while a call into C hangs. So a thread of its own, woken up by
    the C handler through a file descriptor, ends the process when ``grace_seconds`` have passed since the first signal,
    or soon after the second. Processes that are forked from this one, such as the workers of a loader, leave what to do
    to it.

    Args:
        grace_seconds: How long the process may take to end after the first signal.
        exit_code: The exit code that a signal stands for.
        on_first: Called in the main thread when the first signal has come.
        on_second: Called in the main thread when the second one has; it raises.
    """

    def __init__(
        self,
        grace_seconds: float,
        exit_code: Callable[[str], int],
        on_first: Callable[[str], None],
        on_second: Callable[[str], None],
    ) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self._grace_seconds, self._exit_code = grace_seconds, exit_code
        self._on_first, self._on_second = on_first, on_second
        self._previous: dict[int, Any] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._previous_fd = -1
        self._over = threading.Event()
        self._pid = os.getpid()

    def install(self) -> None:
        """Take the signals over, also from others; outside the main thread, which may not, nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            return
        for name in NAMES:
            if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) != self._handle:
                self._previous[number] = signal.signal(number, self._handle)
        if self._sockets is None:
            self._start_thread()

    def restore(self) -> None:
        """Give the signals back where they are still ours: Lightning may have given them back already."""
        self._over.set()
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous)
        self._previous = {}
        if self._sockets is not None:
            if threading.current_thread() is threading.main_thread():
                signal.set_wakeup_fd(self._previous_fd, warn_on_full_buffer=False)
            for end in self._sockets:
                end.close()
            self._sockets = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return
        name = signal.Signals(number).name
        if self.received is None:
            self.received = name
            self._on_first(name)
        else:
            self._on_second(name)

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
        self._sockets, self._previous_fd = (reader, writer), previous
        self._over = threading.Event()
        threading.Thread(target=self._wait, args=(reader, self._over), name="signals", daemon=True).start()

    def _wait(self, reader: socket.socket, over: threading.Event) -> None:
        watched = {int(getattr(signal, name)) for name in NAMES if hasattr(signal, name)}
        seen: list[str] = []
        while not over.is_set():
            with contextlib.suppress(OSError, ValueError):
                if not select.select([reader], [], [], 0.5)[0]:
                    continue
                seen += [signal.Signals(number).name for number in reader.recv(64) if number in watched]
            if not seen:
                continue
            if len(seen) == 1:
                with contextlib.suppress(OSError, ValueError):
                    if not self._second_comes(reader, over, watched, seen):
                        self._end(seen[0], over, 0.0)
            else:
                self._end(seen[-1], over, _LAST_WORD)
            return

    def _second_comes(self, reader: socket.socket, over: threading.Event, watched: set[int], seen: list[str]) -> bool:
        """Whether there is a second signal, or no need to wait for one any more, within the time of grace."""
        left = self._grace_seconds
        while left > 0 and not over.is_set():
            if select.select([reader], [], [], min(left, 0.5))[0]:
                again = [signal.Signals(number).name for number in reader.recv(64) if number in watched]
                if again:
                    self._end(again[-1], over, _LAST_WORD)
                    return True
            left -= 0.5
        return over.is_set()

    def _end(self, name: str, over: threading.Event, wait: float) -> None:
        if over.wait(wait):
            return
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        os._exit(self._exit_code(name))


@functools.cache
def _forget_in_children() -> None:
    """Keep what a forked process receives out of the socket it has inherited."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_wakeup)


def _close_wakeup() -> None:
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
