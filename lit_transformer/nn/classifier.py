"""A transformer that says what class a sequence is of.

Shapes: B batch, T length, D d_model, C classes.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.init import initialize
from lit_transformer.nn.transformer import Decoder, Encoder

Pooling = Literal["mean", "cls", "last"]


def pool(states_BTD: Tensor, real_BT: Tensor | None, how: Pooling) -> Tensor:
    """One vector for each sequence, ``(B, D)``: the mean of its tokens, its first, or its last one.

    Args:
        states_BTD: What the model says of each token.
        real_BT: True where a token is no padding, which is on the right; None if none is.
        how: ``mean``, ``cls`` or ``last``.

    Example:
        >>> states = torch.tensor([[[1.0], [3.0], [9.0]]])
        >>> [pool(states, torch.tensor([[1, 1, 0]]), how).item() for how in ("mean", "cls", "last")]
        [2.0, 1.0, 3.0]
    """
    if how == "cls":
        return states_BTD[:, 0]
    if real_BT is None:
        return states_BTD.mean(1) if how == "mean" else states_BTD[:, -1]
    if how == "mean":
        real_BT1 = real_BT.to(states_BTD.dtype)[..., None]
        return (states_BTD * real_BT1).sum(1) / real_BT1.sum(1).clamp(min=1)
    last_B = (real_BT.long().sum(1) - 1).clamp(min=0)
    return states_BTD[torch.arange(len(last_B), device=last_B.device), last_B]


class EncoderClassifier(nn.Module):
    """An encoder, pooling, and a linear layer over the classes.

    Args:
        config: Shape and choices.
        num_labels: Number of classes.
        pooling: See :func:`pool`; ``cls`` is for tokenizers that begin a text with a token for it.

    Shapes:
        Token ids ``(B, T)``, int64, and a mask ``(B, T)`` that is true where a token is no padding, to logits ``(B,
        C)``.

    Raises:
        ValueError: If ``pooling`` is none of them.
    """

    def __init__(self, config: TransformerConfig, num_labels: int, pooling: Pooling = "mean") -> None:
        super().__init__()
        _check(pooling, get_args(Pooling))
        self.config, self.pooling = config, pooling
        self.encoder = Encoder(config)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.head = _make_head(config, num_labels)

    def forward(self, ids_BT: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """Logits of the classes."""
        logits_BC: Tensor = self.head(self.dropout(pool(self.encoder(ids_BT, real_BT), real_BT, self.pooling)))
        return logits_BC


class DecoderClassifier(Decoder):
    """A decoder, pooling, and a linear layer over the classes; its layers are those of a causal language model.

    Args:
        config: Shape and choices.
        num_labels: Number of classes.
        pooling: See :func:`pool`; ``last`` is the token that has seen all others.

    Shapes:
        As :class:`EncoderClassifier`.

    Raises:
        ValueError: If ``pooling`` is ``cls``: the first token has seen nothing.
    """

    def __init__(self, config: TransformerConfig, num_labels: int, pooling: Pooling = "last") -> None:
        super().__init__(config)
        _check(pooling, ("mean", "last"))
        self.pooling = pooling
        self.dropout = nn.Dropout(config.residual_dropout)
        self.head: nn.Linear = _make_head(config, num_labels)

    # A classifier has no past to go on from, which a decoder's second argument is.
    def forward(self, ids_BT: Tensor, real_BT: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Logits of the classes."""
        logits_BC: Tensor = self.head(self.dropout(pool(self.states(ids_BT), real_BT, self.pooling)))
        return logits_BC


def _check(pooling: str, choices: tuple[str, ...]) -> None:
    if pooling not in choices:
        raise ValueError(f"pooling must be one of {', '.join(choices)}, got {pooling!r}")


def _make_head(config: TransformerConfig, num_labels: int) -> nn.Linear:
    head = nn.Linear(config.d_model, num_labels)
    initialize(head, config, n_sublayers=2 * config.n_layers)
    return head
