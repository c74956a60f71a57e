"""The base of every callback that changes training."""

from lightning.pytorch import LightningModule, Trainer

from lit_callbacks._events import EventLog, run_folder
from lit_callbacks._member import Member


class Actor(Member):
    """Decides from values that all ranks share, before any rank acts, and writes down what it did.

    An exception in an actor ends the run: training on without the protection someone asked for would be worse.
    """

    order = 2

    def __init__(self) -> None:
        self.events = EventLog()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder while all ranks are here."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.events = EventLog(run_folder(trainer))
