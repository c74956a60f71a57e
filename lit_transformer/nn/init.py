"""Initialisation, as standard deviations.

================================= ==================== ==================== ======= =====================
parameter                         xavier               kaiming              normal  gpt2
================================= ==================== ==================== ======= =====================
token and learned position        0.02                 0.02                 0.02    0.02
qkv, up, gate, untied head        sqrt(2/(in + out))   sqrt(2/in)           0.02    0.02
attention out, feed-forward down  sqrt(2/(in + out))   sqrt(2/in)           0.02    0.02 / sqrt(2 n_layers)
norm weight                       1 (constant)         1                    1       1
every bias                        0 (constant)         0                    0       0
================================= ==================== ==================== ======= =====================

``xavier`` is uniform (Glorot and Bengio 2010), each of the stacked matrices in ``qkv`` and ``gate_up`` by its own
shape; ``kaiming`` is normal over the fan-in (He et al. 2015); ``gpt2`` scales what is written into the residual stream,
which 2 n_layers sub-layers add up in (Radford et al. 2019).
"""

import math

from torch import nn

from lit_transformer.nn.config import TransformerConfig

_STACKED = {"qkv": 3, "gate_up": 2}
_RESIDUAL_OUTPUTS = ("out", "down")


def initialize(model: nn.Module, config: TransformerConfig) -> None:
    """Set every parameter of ``model`` as the table says, in place."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            _initialize_linear(module, name.rpartition(".")[2], config)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
    if config.tie_embeddings:  # the shared matrix is an embedding first
        nn.init.normal_(model.get_parameter("token_embedding.weight"), std=0.02)


def _initialize_linear(linear: nn.Linear, role: str, config: TransformerConfig) -> None:
    if config.init == "xavier":
        for matrix in linear.weight.data.chunk(_STACKED.get(role, 1)):
            nn.init.xavier_uniform_(matrix)
    elif config.init == "kaiming":
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    else:
        scaled = config.init == "gpt2" and role in _RESIDUAL_OUTPUTS
        nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layers) if scaled else 0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
