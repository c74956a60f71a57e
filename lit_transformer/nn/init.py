"""Initialisation, as standard deviations.

=========================== ================== ========== ====== =============== ================ ==================
parameter                   xavier             kaiming    normal gpt2            small            deepnorm
=========================== ================== ========== ====== =============== ================ ==================
token and learned position  0.02               0.02       0.02   0.02            sqrt(2/(5 d))    0.02
queries, keys               sqrt(2/(in + out)) sqrt(2/in) 0.02   0.02            sqrt(2/(5 d))    sqrt(2/(in + out))
values                      sqrt(2/(in + out)) sqrt(2/in) 0.02   0.02            sqrt(2/(5 d))    beta * that
up, gate                    sqrt(2/(in + out)) sqrt(2/in) 0.02   0.02            sqrt(2/(5 d))    beta * that
attention out, down         sqrt(2/(in + out)) sqrt(2/in) 0.02   0.02 / sqrt(n)  sqrt(2/(5 d n))  beta * that
untied output layer         sqrt(2/(in + out)) sqrt(2/in) 0.02   0.02            sqrt(2/(5 d))    sqrt(2/(in + out))
norm weight                 1 (constant)       1          1      1               1                1
every bias, ReZero's gate   0 (constant)       0          0      0               0                0
=========================== ================== ========== ====== =============== ================ ==================

``d`` is ``d_model``, ``n`` the number of sub-layers that add to the stream: two a block, three in a decoder that
attends to an encoder. Matrices that are stacked in one parameter are each taken by their own shape. ``xavier`` is
uniform (Glorot and Bengio 2010); ``kaiming`` is normal over the fan-in (He et al. 2015); ``gpt2`` scales what is
written into the stream (Radford et al. 2019), and ``small`` as well, whose embeddings are multiplied by ``sqrt(d)``
where they enter it, so that norms of small inputs do not make large gradients (Takase et al. 2023, "Spike No More").
``deepnorm`` belongs to ``norm_placement: deepnorm``, with beta of
:func:`~lit_transformer.nn.residual.deepnorm_constants`.
"""

import math

import torch
from torch import Tensor, nn

from lit_transformer.nn.config import TransformerConfig
from lit_transformer.nn.residual import ReZero

_RESIDUAL_OUTPUTS = ("out", "down")
_OUTSIDE_OF_BRANCHES = ("head", "dense", "output")


def initialize(model: nn.Module, config: TransformerConfig, n_sublayers: int, beta: float = 1.0) -> None:
    """Set every parameter of ``model`` as the table says, in place.

    Args:
        model: A stack, or an output layer.
        config: The model's configuration.
        n_sublayers: How many sub-layers add to the stream.
        beta: DeepNorm's gain.
    """
    std = math.sqrt(2 / (5 * config.d_model)) if config.init == "small" else 0.02
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Linear):
            scaled = name.rpartition(".")[2] in _RESIDUAL_OUTPUTS and config.init in (None, "gpt2", "small")
            how = std / math.sqrt(n_sublayers) if scaled else std
            for part, matrix in _matrices(name.rpartition(".")[2], module.weight.data, config):
                _initialize_matrix(matrix, part, config, how, beta)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
        elif isinstance(module, ReZero):
            nn.init.zeros_(module.gate)
    if config.tie_embeddings and hasattr(model, "token_embedding"):  # the shared matrix is an embedding first
        nn.init.normal_(model.get_parameter("token_embedding.weight"), std=std)


def _initialize_matrix(matrix: Tensor, part: str, config: TransformerConfig, std: float, beta: float) -> None:
    if config.norm_placement == "deepnorm":
        nn.init.xavier_normal_(matrix, gain=1.0 if part in ("q", "k", *_OUTSIDE_OF_BRANCHES) else beta)
    elif config.init == "xavier":
        nn.init.xavier_uniform_(matrix)
    elif config.init == "kaiming":
        nn.init.kaiming_normal_(matrix, nonlinearity="relu")
    else:
        nn.init.normal_(matrix, std=std)


def stacked_matrices(config: TransformerConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """By the name of a layer, the matrices that are stacked in its weight, with the rows of each.

    Example:
        >>> stacked_matrices(TransformerConfig(d_model=8, n_heads=4, n_kv_heads=2))["qkv"]
        (('q', 8), ('k', 4), ('v', 4))
    """
    keys = config.kv_heads * config.head_dim
    return {
        "qkv": (("q", config.d_model), ("k", keys), ("v", keys)),
        "kv": (("k", keys), ("v", keys)),
        "gate_up": (("gate", config.ffn_width), ("up", config.ffn_width)),
    }


def _matrices(role: str, weight: Tensor, config: TransformerConfig) -> list[tuple[str, Tensor]]:
    """The matrices that are stacked in a weight, and what each is."""
    stacked = stacked_matrices(config)
    if role not in stacked:
        return [(role or "head", weight)]
    parts = torch.split(weight, [size for _, size in stacked[role]])
    return [(name, part) for (name, _), part in zip(stacked[role], parts, strict=True)]
