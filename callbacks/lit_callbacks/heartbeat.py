"""Is the run alive, how far is it, and where does it hang?"""

import contextlib
import faulthandler
import json
import math
import os
import socket
import statistics
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer

from lit_callbacks._events import EventLog, run_folder, say
from lit_callbacks._member import Member
from lit_callbacks.markers import HEARTBEAT

_STEPS = 100  # whose times are remembered
_REARMS = 4  # in the time after which stacks are dumped: arming starts a thread
_UNTIL_KNOWN = 5  # steps before a median says anything


class Heartbeat(Member):
    """Write a small file that tells other processes how far the run is, and dump all stacks when nothing moves.

    ``heartbeat.json`` in the run folder (``heartbeat-rank<r>.json`` for the other ranks) holds step, epoch, stage, Unix
    time, host, process, and the median, the 95th percentile and the longest of the last 100 step times in seconds,
    validation and saving left out. It is replaced in one move, so a reader never sees half of it. A watchdog outside
    looks at its age; a resume tells from it how many steps were lost.

    When nothing has happened for ``hang_factor`` times the median step time, the stacks of all threads go to
    ``stacks.txt`` of the run folder, by a thread that does not need Python's lock. If the run goes on after that, an
    event and a line say so. A long validation step or a slow disk is reported like that too: it costs a file. A
    process has one such timer: this callback and other users of ``faulthandler.dump_traceback_later`` disarm each
    other.

    Args:
        every_seconds: Time between two writes.
        hang_factor: Step times without any sign of life before stacks are dumped.
        hang_seconds: The least time before that.

    Raises:
        ValueError: If an argument is out of range.

    State: none.

    Cost: 2 to 3 µs a step, and 0.1 to 0.4 ms for each write.

    Example:
        >>> Heartbeat(hang_seconds=300.0).hang_factor
        20.0
    """

    serves_shards = True
    serves_zero = True

    order = 0

    def __init__(self, every_seconds: float = 1.0, hang_factor: float = 20.0, hang_seconds: float = 60.0) -> None:
        for name, value in (("every_seconds", every_seconds), ("hang_seconds", hang_seconds)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {value}")
        if not 1 < hang_factor < math.inf:
            raise ValueError(f"hang_factor must be above 1 and finite, got {hang_factor}")
        super().__init__()
        self.every_seconds, self.hang_factor, self.hang_seconds = every_seconds, hang_factor, hang_seconds
        self.events = EventLog()
        self._begin(None)

    def _begin(self, path: Path | None) -> None:
        self._path = path
        self._times: deque[float] = deque(maxlen=_STEPS)
        self._step_began: float | None = None
        self._last_beat = self._armed_at = self._written_at = -math.inf
        self._timeout = self.hang_seconds
        self._stacks: TextIO | None = None
        self._dumped = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_stacks": None, "_path": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder while all ranks are here."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._begin(None)
            return
        folder = run_folder(trainer)
        rank = trainer.global_rank
        self._begin(folder / (HEARTBEAT if rank == 0 else f"heartbeat-rank{rank}.json"))
        self.events = EventLog(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first sign of life."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            name = self._path.name.replace("heartbeat", "stacks").replace(".json", ".txt")
            self._stacks = (self._path.parent / name).open("a", encoding="utf-8")
            self._dumped = self._size()
        self._beat(trainer, "train", write=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step's time begins with the first of its batches."""
        if self._step_began is None:
            self._step_began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A sign of life; and the time of a step, if it was one."""
        if not trainer.fit_loop._should_accumulate() and self._step_began is not None:
            self._times.append(time.monotonic() - self._step_began)
            self._step_began = None
        self._beat(trainer, "train")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A sign of life."""
        if trainer.state.fn == "fit":
            self._beat(trainer, "sanity_check" if trainer.sanity_checking else "validate")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last sign of life."""
        self._beat(trainer, "end", write=True)

    def _beat(self, trainer: Trainer, stage: str, write: bool = False) -> None:
        now = time.monotonic()
        if self._size() > self._dumped:
            self._report(trainer, now - self._last_beat)
        self._last_beat = now
        if now - self._armed_at > self._timeout / _REARMS:
            self._arm(now)
        if write or now - self._written_at >= self.every_seconds:
            self._written_at = now
            self._write(trainer, stage)

    def _arm(self, now: float) -> None:
        if self._stacks is None:
            return
        known = len(self._times) >= _UNTIL_KNOWN
        self._timeout = max(self.hang_seconds, self.hang_factor * statistics.median(self._times) if known else 0.0)
        # It is not armed anew at each beat, so it allows for the time since the last one that did.
        faulthandler.dump_traceback_later(self._timeout * (1 + 1 / _REARMS), file=self._stacks)
        self._armed_at = now

    def _report(self, trainer: Trainer, seconds: float) -> None:
        assert self._stacks is not None
        self._dumped = self._size()
        self.events.write(step=trainer.global_step, event="hang", seconds=round(seconds, 3), stacks=self._stacks.name)
        say(f"step {trainer.global_step}: nothing had moved for {seconds:.0f} s; the stacks are in {self._stacks.name}")
        self._armed_at = -math.inf

    def _size(self) -> int:
        return 0 if self._stacks is None else os.fstat(self._stacks.fileno()).st_size

    def _write(self, trainer: Trainer, stage: str) -> None:
        if self._path is None:
            return
        times = sorted(self._times)
        facts = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "stage": stage,
            "time": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "step_seconds": {
                name: round(times[min(len(times) - 1, int(q * len(times)))], 6) if times else None
                for name, q in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))
            },
        }
        temporary = self._path.with_name(f".{self._path.name}")
        with contextlib.suppress(OSError):  # a full disk says so elsewhere
            temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
            temporary.replace(self._path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Disarm the timer."""
        super().teardown(trainer, pl_module, stage)
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Disarm the timer."""
        super().on_exception(trainer, pl_module, exception)
        self._leave()

    def _leave(self) -> None:
        if self._stacks is None:
            return
        faulthandler.cancel_dump_traceback_later()
        stacks, self._stacks = self._stacks, None
        stacks.close()
        path = Path(stacks.name)
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()
