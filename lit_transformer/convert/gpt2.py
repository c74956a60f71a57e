"""GPT-2 (Radford et al. 2019)."""

from typing import Any

from lit_transformer.convert._names import UNSCALED, Entry, Weights, both, demand
from lit_transformer.nn import Transformer, TransformerConfig
from lit_transformer.nn.config import Activation

MODEL = Transformer
ARCHITECTURE = "GPT2LMHeadModel"
IGNORED = ("*.attn.bias", "*.attn.masked_bias")
OURS: dict[str, object] = {
    "norm_placement": "pre",
    "norm": "layernorm",
    "positions": "learned",
    "bias": True,
    "tie_embeddings": True,
    "activation": ("gelu_tanh", "gelu", "relu", "silu"),
    "n_kv_heads": None,
    "qk_norm": False,
    "embedding_norm": False,
    "sliding_window": None,
    "init": UNSCALED,
}
_THEIRS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "activation_function": ("gelu_new", "gelu", "relu", "silu"),
}
_ACTIVATIONS: dict[str, Activation] = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def config_to_ours(theirs: dict[str, Any]) -> TransformerConfig:
    """Our settings from the ``config.json``."""
    demand(theirs, _THEIRS)
    return TransformerConfig(
        vocab_size=theirs["vocab_size"],
        max_length=theirs["n_positions"],
        d_model=theirs["n_embd"],
        n_layers=theirs["n_layer"],
        n_heads=theirs["n_head"],
        d_ff=theirs.get("n_inner"),
        norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
        activation=_ACTIVATIONS[theirs.get("activation_function", "gelu_new")],
        attention_dropout=theirs.get("attn_pdrop", 0.1),
        ffn_dropout=0.0,
        residual_dropout=theirs.get("resid_pdrop", 0.1),
        embedding_dropout=theirs.get("embd_pdrop", 0.1),
    )


def config_to_theirs(ours: TransformerConfig) -> dict[str, Any]:
    """The ``config.json`` from our settings."""
    return {
        "vocab_size": ours.vocab_size,
        "n_positions": ours.max_length,
        "n_embd": ours.d_model,
        "n_layer": ours.n_layers,
        "n_head": ours.n_heads,
        "n_inner": ours.ffn_width,
        "layer_norm_epsilon": ours.norm_eps,
        "activation_function": {v: k for k, v in _ACTIVATIONS.items()}[ours.activation],
        "attn_pdrop": ours.attention_dropout,
        "resid_pdrop": ours.residual_dropout,
        "embd_pdrop": ours.embedding_dropout,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def current_names(theirs: Weights) -> Weights:
    """Weights of older files under their names of today: OpenAI's have no ``transformer.`` in front."""
    if any(name.startswith("transformer.") for name in theirs):
        return theirs
    return {name if name.startswith("lm_head.") else f"transformer.{name}": w for name, w in theirs.items()}


def entries(config: TransformerConfig) -> list[Entry]:
    """Which weight is which."""
    found = [
        *both("token_embedding", "transformer.wte", ["weight"]),
        *both("positions.embedding", "transformer.wpe", ["weight"]),
        *both("final_norm", "transformer.ln_f"),
    ]
    for i in range(config.n_layers):
        here, there = f"blocks.{i}", f"transformer.h.{i}"
        found += both(f"{here}.attention.norm", f"{there}.ln_1")
        found += both(f"{here}.attention.sublayer.qkv", f"{there}.attn.c_attn", transposed=True)
        found += both(f"{here}.attention.sublayer.out", f"{there}.attn.c_proj", transposed=True)
        found += both(f"{here}.feed_forward.norm", f"{there}.ln_2")
        found += both(f"{here}.feed_forward.sublayer.up", f"{there}.mlp.c_fc", transposed=True)
        found += both(f"{here}.feed_forward.sublayer.down", f"{there}.mlp.c_proj", transposed=True)
    return found
