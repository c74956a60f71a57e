"""How large is the gradient?"""

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_callbacks._facts import facts_of
from lit_callbacks._observer import Observer


class GradientNormLogger(Observer):
    r"""Log the norm of the gradient that the optimizer is about to use, before clipping.

    The norm is :math:`\sqrt{\sum_p \lVert g_p \rVert_2^2}` in fp32 over all parameters of the optimizer, where
    :math:`g_p` is the gradient after accumulation and averaging over ranks, with the factor of a GradScaler taken out.
    It is the quantity that ``gradient_clip_val`` bounds (Pascanu et al., ICML 2013, *On the difficulty of training
    recurrent neural networks*).

    Logs, every ``every_n_steps`` optimizer steps:
        grad_norm/total: norm over all parameters; with several optimizers, ``grad_norm/total_<index>`` for each, in the
            order of ``configure_optimizers``. NaN and infinity are logged as they are. Also in
            ``trainer.callback_metrics``.

    Args:
        every_n_steps: Optimizer steps between measurements.

    Raises:
        ValueError: If ``every_n_steps`` is below 1, or at setup under a strategy that shards gradients.

    Cost: one pass over the gradients and one read by the host on measured steps; see the catalogue for numbers.

    Example:
        >>> GradientNormLogger(every_n_steps=100).every_n_steps
        100
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        super().__init__(every_n_steps)

    def measure(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> dict[str, Tensor]:
        """The norm of this optimizer's gradient."""
        suffix = f"_{trainer.optimizers.index(optimizer)}" if len(trainer.optimizers) > 1 else ""
        return {f"grad_norm/total{suffix}": facts_of(trainer).grad_norm(trainer, optimizer)}

    def summary(self, values: dict[str, float]) -> list[str]:
        """All of them may be monitored."""
        return list(values)
