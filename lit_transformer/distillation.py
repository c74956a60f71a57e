"""Learning from a teacher's probabilities beside the labels (Hinton et al. 2015)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Distillation:
    """A trained model whose probabilities are learned as well.

    The loss is ``(1 - weight) * loss + weight * temperature**2 * KL(teacher || student)``, the probabilities of both
    softened by the temperature; its square keeps the gradients of the second part as large as they are without.

    Args:
        teacher: A checkpoint of ours, or a Hugging Face folder or name; with the same vocabulary or classes as the
            student. On the command line also the folder of a run, for its best checkpoint.
        temperature: Above 1, the teacher's ranking of wrong answers counts for more. 2 to 4 is usual.
        weight: Share of the teacher.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]])
        >>> counted = torch.tensor([[True, False]])
        >>> float(Distillation("t").divergence(logits, logits, counted))
        0.0
    """

    teacher: str
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 < self.weight <= 1:
            raise ValueError(f"weight must be above 0 and at most 1, got {self.weight}")

    def divergence(self, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        """The mean of ``temperature**2 * KL(teacher || student)`` over what counts, in nats.

        Args:
            student: Logits ``(..., C)``.
            teacher: Likewise.
            counted: Mask ``(...)``.
        """
        t = self.temperature
        log_p, log_q = (F.log_softmax(logits.float() / t, dim=-1) for logits in (teacher, student))
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        return t * t * (kl * counted).sum() / counted.sum().clamp(min=1)

    def mix(self, loss: Tensor, divergence: Tensor) -> Tensor:
        """What is minimised."""
        return (1 - self.weight) * loss + self.weight * divergence
