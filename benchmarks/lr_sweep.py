"""Learning rates: does the range test find a good one, and how much does it matter?

The default run is trained at seven learning rates, a factor of two apart, and at the one that `lr_find` suggests, from
the same seed. Printed are the validation losses, how far the suggestion is from the best of the seven, and the mean
excess loss over the sweep (Wortsman et al. 2023, "Small-scale proxies"): the mean over the seven of the loss above the
best one, clipped at that of guessing a byte. With `--config post_ln`, or settings of `fit`, for another recipe.

    python benchmarks/lr_sweep.py                    # some twenty minutes on two cores
    python benchmarks/lr_sweep.py --config post_ln --seeds 1 2 3
    python benchmarks/lr_sweep.py --model.init_args.config.qk_norm true
"""

import argparse
import contextlib
import io
import logging
import math
import statistics
import warnings

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_transformer.commands.prepared import PreparedCLI
from lit_transformer.optim.lr_range_test import RangeTest

RATES = [2.5e-4 * 2**i for i in range(7)]


class FinalLoss(Callback):
    """The validation loss at the end."""

    value = math.nan

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it."""
        self.value = float(trainer.callback_metrics["val/loss"])


def prepared(recipe: list[str], seed: int, visitor: Callback, *words: str) -> None:
    """Train the recipe with a visitor, quietly."""
    given = [*recipe, "--seed_everything", str(seed), "--trainer.enable_progress_bar", "false", *words]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        PreparedCLI(given, lambda parser: None, visitor).start()


def final_loss(recipe: list[str], seed: int, rate: float) -> float:
    """The validation loss of a run at a learning rate."""
    visitor = FinalLoss()
    prepared(recipe, seed, visitor, "--model.init_args.optimizer.init_args.lr", str(rate))
    return visitor.value


def suggested(recipe: list[str], seed: int) -> float:
    """What the range test suggests."""
    test = RangeTest()
    prepared(recipe, seed, test, "--trainer.max_steps", str(test.steps), "--trainer.limit_val_batches", "0")
    rate = test.curve.suggestion()
    assert rate is not None
    return rate


def mean_excess(losses: list[float]) -> float:
    """How much the learning rate matters: the mean loss above the best one, clipped at that of guessing a byte."""
    return statistics.mean(min(loss, math.log(256)) - min(losses) for loss in losses)


def quiet() -> None:
    """No warnings and no words of the trainer's."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def main() -> None:
    """Sweep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    options, words = parser.parse_known_args()
    recipe = ["--config", options.config, *words]
    quiet()
    for seed in options.seeds:
        rate = suggested(recipe, seed)
        print(f"seed {seed}: the range test suggests {rate:.2g}", flush=True)
        found = {}
        for tried in (rate, *RATES):
            found[tried] = final_loss(recipe, seed, tried)
            print(f"  {tried:.2g}: {found[tried]:.4f}", flush=True)
        swept = [found[tried] for tried in RATES]
        print(
            f"  the suggestion ends {100 * (found[rate] / min(swept) - 1):+.2f} % from the best of the seven; "
            f"mean excess loss {mean_excess(swept):.3f}"
        )


if __name__ == "__main__":
    main()
