"""The norms of a block."""

from torch import nn

from lit_transformer.nn.config import TransformerConfig


def make_norm(config: TransformerConfig) -> nn.Module:
    """The norm that ``config`` asks for, over the last dimension of ``(batch, length, d_model)``.

    Example:
        >>> make_norm(TransformerConfig(d_model=8, norm="rmsnorm", norm_eps=1e-6))
        RMSNorm((8,), eps=1e-06, elementwise_affine=True)
    """
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
