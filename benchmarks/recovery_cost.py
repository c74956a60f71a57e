"""What LossSpikeRecovery costs a healthy run: in each step, and for each snapshot.

Process CPU time, one thread, a language model of 5 M parameters (that of monitor_overhead.py). A step's cost is the
time inside the callback's own functions, with the gradient norm and the read by the host that it shares with others,
averaged over whole periods between snapshots. A snapshot is compared with ``torch._foreach_copy_`` of the same tensors
into room that is there already, in turns: median and quartiles of the ratio.

    python benchmarks/recovery_cost.py        # some three minutes
"""

import statistics
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from overhead_fits import fit_language_model, quartiles

from lit_callbacks import LossSpikeRecovery, NonFiniteAutopsy, NonFiniteGuard
from lit_callbacks._probe_batch import any_non_finite
from lit_callbacks._snapshots import Place, Snapshot, host_room
from lit_callbacks._training_state import live_tensors

STEPS, ROUNDS = 52, 30


class CompareSnapshots(Callback):
    """In the last step, snapshots and plain copies take turns."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Time them."""
        if batch_idx != 2:
            return
        live, snapshot = live_tensors(trainer, pl_module), Snapshot(host_room(pinned=False))
        copies = [torch.empty_like(tensor) for tensor in live.values()]
        self.bytes, self.tensors = sum(t.nbytes for t in live.values()), len(live)

        def take() -> None:
            snapshot.take(trainer, live_tensors(trainer, pl_module), Place(0, 0, 0))

        ways = {
            "copy": lambda: torch._foreach_copy_(copies, list(live.values())),
            "snapshot": take,
            "with the look at the weights": lambda: (any_non_finite(trainer, live), take()),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                start = time.process_time()
                way()
                times[name].append(time.process_time() - start)
        self.times = {name: values[3:] for name, values in times.items()}


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare = CompareSnapshots()
        fit_language_model([compare], folder, steps=3)
        print(f"A snapshot of {compare.bytes / 2**20:.0f} MiB in {compare.tensors} tensors:\n")
        print("| | ms | times `torch._foreach_copy_` [quartiles] |\n|---|---|---|")
        for name, values in compare.times.items():
            ratios = [value / copy for value, copy in zip(values, compare.times["copy"], strict=True)]
            low, middle, high = quartiles(ratios)
            print(f"| {name} | {1e3 * statistics.median(values):.1f} | {middle:.2f} [{low:.2f}, {high:.2f}] |")
        print("\n| | ms in each step | % of a step |\n|---|---|---|")
        for make in (NonFiniteGuard, NonFiniteAutopsy, LossSpikeRecovery):
            steps = fit_language_model([make()], folder, steps=STEPS)[2:]
            own, whole = statistics.fmean(s.own for s in steps), statistics.fmean(s.whole for s in steps)
            print(f"| {make.__name__} | {1e3 * own:.2f} | {100 * own / (whole - own):.2f} |")


if __name__ == "__main__":
    main()
