"""How often LossSpikeRecovery acts where nothing is wrong: 30 000 healthy steps of twelve runs.

Other models, batch sizes and learning rates than those its constants were chosen on; the first descent and the plateau,
shuffled data, no fault. A skip is a false alarm, and so is a rollback; a look at the weights (one forward pass) is not.

    python benchmarks/false_alarms.py                  # some fifteen minutes on two cores
    python benchmarks/false_alarms.py --save FOLDER    # and keep losses and gradient norms
"""

import argparse
import json
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from fault_runs import Recipe, run

from lit_callbacks import LossSpikeRecovery

RECIPES = {
    "LR 5e-4, batch 8": Recipe(lr=5e-4, batch_size=8),
    "LR 2e-3, batch 8, 2 layers x 96": Recipe(lr=2e-3, batch_size=8, layers=2, width=96),
    "LR 2e-3, batch 6, constant": Recipe(lr=2e-3, batch_size=6, schedule_end=1.0),
    "LR 5e-3, batch 24": Recipe(lr=5e-3, batch_size=24, layers=2),
    "LR 5e-3, batch 3": Recipe(lr=5e-3, batch_size=3, layers=2),
    "LR 8e-3, batch 48, 1 layer x 128": Recipe(lr=8e-3, batch_size=48, layers=1, width=128),
    "LR 1.5e-3, batch 12, dropout 0.2": Recipe(lr=1.5e-3, batch_size=12, dropout=0.2),
    "LR 1.5e-3, batch 5, post-LN": Recipe(lr=1.5e-3, batch_size=5, norm_placement="post", warmup=200),
    "LR 2e-3, batch 20, 6 layers x 48": Recipe(lr=2e-3, batch_size=20, layers=6, width=48),
    "LR 1e-2, batch 12, 2 layers x 32": Recipe(lr=1e-2, batch_size=12, layers=2, width=32),
    "LR 4e-3, batch 96, 1 layer x 64": Recipe(lr=4e-3, batch_size=96, layers=1),
    "LR 3e-3, batch 2, no warm-up": Recipe(lr=3e-3, batch_size=2, warmup=0, layers=2),
}
STEPS = 2500


class Looks(LossSpikeRecovery):
    """Counts its looks at the weights, and keeps what it judged."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.judged: list[tuple[float, float]] = []
        decide = self._ladder.decide

        def judge(step: int, loss: float, grad_norm: float, ask: Any) -> Any:
            self.judged.append((loss, grad_norm))

            def look(excess: float, before: int) -> bool | None:
                self.looks += 1
                return ask(excess, before)

            return decide(step, loss, grad_norm, look)

        self._ladder.decide = judge  # type: ignore[method-assign]


def healthy(job: tuple[str, int, str | None]) -> tuple[str, int, int, int, float]:
    """One run: its name, skips, rollbacks, looks and final loss."""
    name, steps, folder = job
    torch.set_num_threads(1)
    recovery = Looks()
    result = run(seed=11, callbacks=[recovery], faults=[], recipe=replace_steps(RECIPES[name], steps))
    if folder is not None:
        (Path(folder) / f"{name}.json").write_text(json.dumps(recovery.judged))
    kinds = [kind for _, kind in result.actions]
    return name, kinds.count("skip"), kinds.count("rollback") + kinds.count("stop"), recovery.looks, result.loss


def replace_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe, for so many steps."""
    return Recipe(**{**vars(recipe), "steps": steps})


def main() -> None:
    """Run all, two at a time, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--save", default=None)
    arguments = parser.parse_args()
    if arguments.save is not None:
        Path(arguments.save).mkdir(parents=True, exist_ok=True)
    print("| run | false skips | false rollbacks | looks at the weights | final loss |\n|---|---|---|---|---|")
    totals = [0, 0, 0]
    with get_context("spawn").Pool(2) as pool:
        for name, *counts, loss in pool.imap(healthy, [(name, arguments.steps, arguments.save) for name in RECIPES]):
            print(f"| {name} | {' | '.join(map(str, counts))} | {loss:.3f} |", flush=True)
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
    steps = arguments.steps * len(RECIPES)
    print(f"\n{steps} steps: {1000 * totals[0] / steps:.2f} false skips in 1000, {totals[1]} false rollbacks.")


if __name__ == "__main__":
    main()
