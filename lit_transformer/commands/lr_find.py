"""``lr_find``: which learning rate?"""

from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from lit_transformer.commands.prepared import PreparedCLI
from lit_transformer.errors import UsageError
from lit_transformer.optim.lr_range_test import RangeCurve, RangeTest

_ENDLESS = 10**9  # the test ends itself


def main(words: list[str]) -> None:
    """Run the range test, write its curve and its picture, and print the suggestion.

    Raises:
        UsageError: For anything wrong in the words or the configuration, or if the loss never falls.
    """

    def options(parser: LightningArgumentParser) -> None:
        parser.add_argument("--min_lr", type=float, default=test.min_lr, help="The first learning rate.")
        parser.add_argument("--max_lr", type=float, default=test.max_lr, help="The last one.")
        parser.add_argument("--factor", type=float, default=test.factor, help="From one to the next.")
        parser.add_argument(
            "--to", type=str, default="lr_find.png", help="The picture; the numbers go beside it as CSV."
        )

    test = RangeTest()
    endless = ["--trainer.limit_val_batches", "0", "--trainer.max_steps", str(_ENDLESS), "--trainer.max_epochs", "-1"]
    cli = PreparedCLI([*words, *endless, "--model.init_args.schedule", "null"], options, test)
    settings = cli.settings
    try:
        fresh = RangeTest(settings.min_lr, settings.max_lr, settings.factor)
    except ValueError as error:
        raise UsageError(str(error)) from None
    vars(test).update(vars(fresh))
    print(f"At most {test.steps} steps, from a learning rate of {test.min_lr:g} to {test.max_lr:g}.", flush=True)
    cli.start()
    path = Path(settings.to)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(test.curve, path.with_suffix(".csv"))
    rate = test.curve.suggestion()
    draw(test.curve, rate, path)
    print(f"Curve: {path} and {path.with_suffix('.csv')}")
    if rate is None:
        raise UsageError("the loss never falls: no learning rate can be suggested. Look at the model and the data.")
    print(f"Suggested: --model.init_args.optimizer.init_args.lr {rate:.2g}")


def write(curve: RangeCurve, path: Path) -> None:
    """One line per step."""
    lines = [f"{rate:.6g},{loss:.6g}" for rate, loss in zip(curve.rates, curve.losses, strict=False)]
    path.write_text("\n".join(["lr,loss", *lines]) + "\n", encoding="utf-8")


def draw(curve: RangeCurve, rate: float | None, path: Path) -> None:
    """Losses as measured and smoothed, over the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    n = len(curve.losses)
    axes.plot(curve.rates[:n], curve.losses, color="lightgrey", label="loss")
    axes.plot(curve.rates[:n], curve.smoothed(), label="smoothed")
    if rate is not None:
        axes.axvline(rate, color="black", linestyle=":", label=f"suggested: {rate:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    if n:
        axes.set_ylim(0.9 * min(curve.losses), 1.1 * max(curve.losses[0], min(curve.losses)))
    axes.legend()
    figure.savefig(path, dpi=120)
