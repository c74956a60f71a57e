"""When is it time?"""


class Cadence:
    """Due at the first step at or after each multiple of ``every_n_steps``, for each of several keys.

    Args:
        every_n_steps: Optimizer steps.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.

    Example:
        >>> cadence = Cadence(3)
        >>> cadence.start(2)  # a run that is resumed at step 2
        >>> [step for step in range(2, 10) if cadence.due(step)]
        [3, 6, 9]
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.start(0)

    def start(self, step: int) -> None:
        """Begin counting, also in the middle of a run."""
        self._before_start = (step - 1) // self.every_n_steps
        self._last_period: dict[int, int] = {}

    def due(self, step: int, key: int = 0) -> bool:
        """Whether it is time; the next time is then a period later."""
        period = step // self.every_n_steps
        if period == self._last_period.get(key, self._before_start):
            return False
        self._last_period[key] = period
        return True
