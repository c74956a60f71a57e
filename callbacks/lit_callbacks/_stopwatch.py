"""Times of steps, and of waiting between batches, on a clock that can be stopped."""

import time


class Stopwatch:
    """Measures steps made of batches. While it is paused, no time passes."""

    def __init__(self) -> None:
        self._not_counted = 0.0
        self._paused_at: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begin a period; what was measured is forgotten."""
        self._began = self._step_began = self._batch_ended = self._now()
        self.waited = 0.0
        self.step_times: list[float] = []

    @property
    def seconds(self) -> float:
        """Length of the period so far."""
        return self._now() - self._began

    def begin_batch(self) -> None:
        """The wait for a batch is over."""
        self.waited += self._now() - self._batch_ended

    def end_batch(self) -> None:
        """The wait for the next batch begins."""
        self._batch_ended = self._now()

    def end_step(self) -> None:
        """A step has ended, and the next begins."""
        now = self._now()
        self.step_times.append(now - self._step_began)
        self._step_began = now

    def pause(self) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def go_on(self) -> None:
        """Start the clock again."""
        if self._paused_at is not None:
            self._not_counted += time.perf_counter() - self._paused_at
            self._paused_at = None

    def _now(self) -> float:
        return time.perf_counter() - self._not_counted
