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


def make_head_norm(config: TransformerConfig) -> nn.Module | None:
    """The norm of queries or keys, over the features of a head; never with a bias, as in ViT-22B.

    A bias of the keys would add the same to all logits of a query, which softmax does not see.
    """
    if not config.qk_norm:
        return None
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.head_dim, eps=config.norm_eps)
    return nn.LayerNorm(config.head_dim, eps=config.norm_eps, bias=False)
