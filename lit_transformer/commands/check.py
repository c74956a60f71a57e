"""``check``: is the recipe a good one?"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from lit_callbacks.recipe import IDS, Finding, check
from lit_transformer.commands.baseline import compare
from lit_transformer.commands.prepared import Enough, PreparedCLI, Visit
from lit_transformer.errors import UsageError

_LEARNED = 0.5  # of the first loss


def main(words: list[str]) -> None:
    """Print a line for each finding; leave with code 1 if one of them is an error.

    Raises:
        UsageError: For anything wrong in the words or the configuration, and for ids that there are not.
    """
    findings: list[Finding] = []

    def look(trainer: Trainer, module: LightningModule) -> None:
        findings.extend(check(trainer, module, cli.settings.silence))

    # RecipeCheck would say the same once more.
    cli = PreparedCLI([*words, "--recipe_check", "null"], _options, Visit(look), keep_defaults=True)
    if unknown := sorted(set(cli.settings.silence) - set(IDS)):
        raise UsageError(f"no finding has the id {', '.join(unknown)}; there are {', '.join(IDS)}")
    with contextlib.suppress(Enough):
        cli.start()
    if (steps := cli.settings.overfit_steps) > 0:
        findings.extend(_overfit(words, steps))
    if (steps := cli.settings.baseline_steps) > 0:
        findings.extend(compare(words, steps, _options))
    findings = [finding for finding in findings if finding.id not in cli.settings.silence]
    for finding in findings:
        print(finding)
    if not findings:
        print("Nothing is wrong with this recipe that the rules know of.")
    if any(finding.severity == "error" for finding in findings):
        sys.exit(1)


def _options(parser: LightningArgumentParser) -> None:
    parser.add_argument("--silence", type=list[str], default=[], help="Ids of findings that are not wanted.")
    parser.add_argument(
        "--overfit_steps", type=int, default=0, help="Train on one batch for so many steps; 100 are enough."
    )
    parser.add_argument(
        "--baseline_steps", type=int, default=0, help="Train so many steps, a model without attention as well; try 300."
    )


class OneBatch(Callback):
    """Every batch is the first one."""

    def __init__(self) -> None:
        self.batch: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the first one in its place."""
        self.batch = self.batch or dict(batch)
        batch.update(self.batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """What it is learned to."""
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)


def _overfit(words: list[str], steps: int) -> Iterator[Finding]:
    """A model, a loss and labels that belong together can learn one batch by heart."""
    visitor = OneBatch()
    short = f"--trainer.max_steps {steps} --trainer.limit_val_batches 0 --trainer.enable_progress_bar false"
    PreparedCLI([*words, *short.split(), "--model.init_args.schedule", "null"], _options, visitor).start()
    first, last = visitor.losses[0], visitor.losses[-1]
    print(f"One batch, {steps} steps: the loss goes from {first:.3f} to {last:.3f}.")
    if not last < _LEARNED * first:
        text = f"After {steps} steps on one batch the loss is {last:.3f}, and it was {first:.3f}."
        yield Finding("overfit-one-batch", "error", text, "Look at the loss, the labels and the learning rate.")
