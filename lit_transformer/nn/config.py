"""What a transformer looks like, as plain numbers and names."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

NormPlacement = Literal["pre", "post", "sandwich", "deepnorm", "rezero"]
Norm = Literal["layernorm", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "geglu", "swiglu"]
Positions = Literal["learned", "sinusoidal", "rotary", "none"]
Init = Literal["xavier", "kaiming", "normal", "gpt2", "small"]

_CHOICES = {
    "norm_placement": NormPlacement,
    "norm": Norm,
    "activation": Activation,
    "positions": Positions,
    "init": Init,
}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and choices of a transformer.

    Args:
        vocab_size: Number of token ids. Under the command line it comes from the data.
        max_length: Longest sequence the model accepts, in tokens.
        d_model: Width of the residual stream.
        n_layers: Number of blocks; of an encoder-decoder, in the encoder.
        n_decoder_layers: Of an encoder-decoder, blocks in the decoder; by default as many as in the encoder.
        n_heads: Attention heads; must divide ``d_model``.
        n_kv_heads: Heads of keys and values, each shared by as many of ``n_heads``, which they must divide: 1 is
            multi-query (Shazeer 2019), more are grouped-query attention (Ainslie et al. 2023); by default ``n_heads``.
        d_ff: Width of the feed-forward layer. By default ``4 * d_model``, for ``geglu`` and ``swiglu`` ``8/3 *
            d_model`` rounded up to a multiple of 64, which has the same number of parameters (Shazeer 2020).
        norm_placement: Where the norm stands in a block, see :mod:`lit_transformer.nn.residual`.
        norm: ``layernorm`` (Ba et al. 2016) or ``rmsnorm`` (Zhang and Sennrich 2019).
        norm_eps: Added to the variance inside the norm.
        qk_norm: Whether queries and keys are normalised, each head for itself, before positions turn them: logits then
            cannot grow with the weights, and larger learning rates do not diverge (Henry et al. 2020, Dehghani et al.
            2023).
        activation: Nonlinearity of the feed-forward layer, see :mod:`lit_transformer.nn.feed_forward`.
        positions: How a token learns its place, see :mod:`lit_transformer.nn.positions`.
        rope_base: Slowest wavelength of rotary positions over ``2 pi``, in tokens.
        sliding_window: How many tokens a token sees at most, itself and those before it; in an encoder, to either side
            (Beltagy et al. 2020). By default all.
        bias: Whether linear layers and LayerNorm have a bias.
        tie_embeddings: Whether the output layer shares the token embedding (Press and Wolf 2017).
        init: Initialisation, see the table in :mod:`lit_transformer.nn.init`; by default ``gpt2``. ``deepnorm`` brings
            its own.
        embedding_norm: Whether there is a norm after the embeddings, as in BERT.
        attention_dropout: Dropout on the attention weights.
        ffn_dropout: Dropout after the activation of the feed-forward layer.
        residual_dropout: Dropout on the output of every sub-layer, before it joins the residual stream.
        embedding_dropout: Dropout on the sum of token and position embeddings.
        stochastic_depth: Probability that a sample passes by the last block; from the first block to it, the
            probability rises linearly (Huang et al. 2016).
        activation_checkpointing: Forget what every n-th block has computed, and compute it again in the backward pass:
            memory for time. 0 forgets nothing, 1 all.

    Raises:
        ValueError: If a value is out of range, or two of them do not fit together; both are named.

    Example:
        >>> TransformerConfig(d_model=64, n_heads=4).head_dim
        16
        >>> TransformerConfig(d_model=64, n_heads=5)
        Traceback (most recent call last):
        ValueError: d_model must be divisible by n_heads, got d_model=64 and n_heads=5; use n_heads=4 or d_model=65
    """

    vocab_size: int = 256
    max_length: int = 256
    d_model: int = 256
    n_layers: int = 4
    n_decoder_layers: int | None = None
    n_heads: int = 4
    n_kv_heads: int | None = None
    d_ff: int | None = None
    norm_placement: NormPlacement = "pre"
    norm: Norm = "layernorm"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    activation: Activation = "gelu"
    positions: Positions = "learned"
    rope_base: float = 10_000.0
    sliding_window: int | None = None
    bias: bool = True
    tie_embeddings: bool = True
    init: Init | None = None
    embedding_norm: bool = False
    attention_dropout: float = 0.1
    ffn_dropout: float = 0.1
    residual_dropout: float = 0.1
    embedding_dropout: float = 0.1
    stochastic_depth: float = 0.0
    activation_checkpointing: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size is None:  # what the command line passes on where the data has none
            raise ValueError("vocab_size must be at least 1, got None; give the data module a vocab_size")
        for name in ("vocab_size", "max_length", "d_model", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("d_ff", "n_decoder_layers", "n_kv_heads", "sliding_window"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}; leave it out for the usual")
        for name in ("norm_eps", "rope_base"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.activation_checkpointing < 0:
            raise ValueError(f"activation_checkpointing must be at least 0, got {self.activation_checkpointing}")
        dropouts = ("attention_dropout", "ffn_dropout", "residual_dropout", "embedding_dropout", "stochastic_depth")
        for name in dropouts:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in (get_args(choices) if name != "init" else (*get_args(choices), None)):
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}")
        if self.d_model % self.n_heads:
            fitting = max(h for h in range(1, self.n_heads + 1) if self.d_model % h == 0)
            rounded = self.d_model + self.n_heads - self.d_model % self.n_heads
            raise ValueError(
                f"d_model must be divisible by n_heads, got d_model={self.d_model} and n_heads={self.n_heads}; "
                f"use n_heads={fitting} or d_model={rounded}"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads must be divisible by n_kv_heads, got n_heads={self.n_heads} and n_kv_heads={self.kv_heads};"
                f" use n_kv_heads={math.gcd(self.n_heads, self.kv_heads)}"
            )
        if self.norm_placement == "deepnorm" and self.init is not None:
            raise ValueError(
                f"norm_placement=deepnorm brings its own initialisation, got init={self.init}; leave init out"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"rotary positions turn pairs of features, so d_model / n_heads must be even, got {self.d_model} / "
                f"{self.n_heads} = {self.head_dim}"
            )
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"sinusoidal positions need an even d_model, got {self.d_model}")

    @property
    def head_dim(self) -> int:
        """Features per attention head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """``n_kv_heads``, or its default."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def decoder_layers(self) -> int:
        """``n_decoder_layers``, or its default."""
        return self.n_layers if self.n_decoder_layers is None else self.n_decoder_layers

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.activation in ("geglu", "swiglu")

    @property
    def ffn_width(self) -> int:
        """``d_ff``, or its default."""
        if self.d_ff is not None:
            return self.d_ff
        if self.gated:
            return -(-8 * self.d_model // (3 * 64)) * 64
        return 4 * self.d_model
