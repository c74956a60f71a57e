"""``check``: is the recipe a good one?"""

import contextlib
import sys

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lit_callbacks.recipe import IDS, Finding, check
from lit_transformer.commands.prepared import Enough, PreparedCLI, Visit
from lit_transformer.errors import UsageError


def main(words: list[str]) -> None:
    """Print a line for each finding; leave with code 1 if one of them is an error.

    Raises:
        UsageError: For anything wrong in the words or the configuration, and for ids that there are not.
    """
    findings: list[Finding] = []

    def options(parser: LightningArgumentParser) -> None:
        parser.add_argument("--silence", type=list[str], default=[], help="Ids of findings that are not wanted.")

    def look(trainer: Trainer, module: LightningModule) -> None:
        findings.extend(check(trainer, module, cli.settings.silence))

    cli = PreparedCLI(words, options, Visit(look), keep_defaults=True)
    if unknown := sorted(set(cli.settings.silence) - set(IDS)):
        raise UsageError(f"no finding has the id {', '.join(unknown)}; there are {', '.join(IDS)}")
    with contextlib.suppress(Enough):
        cli.start()
    for finding in findings:
        print(finding)
    if not findings:
        print("Nothing is wrong with this recipe that the rules know of.")
    if any(finding.severity == "error" for finding in findings):
        sys.exit(1)
