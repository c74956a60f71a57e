"""What a rule finds, and all rules by their stable ids."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from lit_callbacks._rng import rng_state, set_rng_state
from lit_callbacks.recipe.plan import Plan

Severity = Literal["error", "warning", "note"]
Rule = Callable[[Plan], Iterator[tuple[str, str]]]

_RULES: dict[str, tuple[Severity, Rule]] = {}
IDS: list[str] = ["not-learning", "generalization-gap", "overfit-one-batch", "worse-than-baseline"]
"""The ids of all rules; the first two are asked while a run is under way, the two after them where they are wanted."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and what to do about it.

    Args:
        id: Stable, for silencing.
        severity: An error cannot train, a warning is expected to cost quality or stability, a note is to be known.
        text: What was found, with its value.
        fix: What to change.

    Example:
        >>> print(Finding("no-clipping", "warning", "Gradients are not clipped.", "Set gradient_clip_val to 1.0."))
        warning no-clipping: Gradients are not clipped. Set gradient_clip_val to 1.0.
    """

    id: str
    severity: Severity
    text: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity} {self.id}: {self.text} {self.fix}"


def rule(id: str, severity: Severity) -> Callable[[Rule], Rule]:
    """Register a rule: a function that yields a text and a fix for each thing it finds in a plan."""

    def register(function: Rule) -> Rule:
        _RULES[id] = (severity, function)
        IDS.append(id)
        return function

    return register


def check(trainer: Trainer, module: LightningModule, silence: Iterable[str] = ()) -> list[Finding]:
    """Ask all rules.

    Args:
        trainer: In ``on_train_start`` of a fit, or later: optimizers and loaders are there.
        module: What it trains.
        silence: Ids of rules to leave out.

    A rule that raises is a note, and stops nothing.

    Cost: the learning rates of the run, and some seconds of reading samples, from data sets that can be indexed.
    """
    plan, silenced = Plan(trainer, module), set(silence)
    asked = [(id, severity, function) for id, (severity, function) in _RULES.items() if id not in silenced]
    device = trainer.strategy.root_device
    random_numbers = rng_state(device)  # data sets that augment draw them
    findings: list[Finding] = []
    try:
        for id, severity, function in asked:
            try:
                findings += [Finding(id, severity, text, fix) for text, fix in function(plan)]
            except Exception as error:  # of a data set or a module that we do not know
                text = f"This rule could not be asked ({type(error).__name__}: {error})."
                findings.append(Finding(id, "note", text, "Look yourself, or silence it."))
    finally:
        set_rng_state(random_numbers, device)
    return findings
