"""LLaMA (Touvron et al. 2023)."""

from typing import Any

from lit_transformer.convert._names import UNSCALED, Entry, Weights, both, demand
from lit_transformer.nn import Transformer, TransformerConfig

MODEL = Transformer
ARCHITECTURE = "LlamaForCausalLM"
IGNORED = ("*.rotary_emb.inv_freq",)
OURS: dict[str, object] = {
    "norm_placement": "pre",
    "norm": "rmsnorm",
    "positions": "rotary",
    "bias": False,
    "activation": "swiglu",
    "qk_norm": False,
    "embedding_norm": False,
    "sliding_window": None,
    "init": UNSCALED,
}
_THEIRS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}


def config_to_ours(theirs: dict[str, Any]) -> TransformerConfig:
    """Our settings from the ``config.json``."""
    demand(theirs, _THEIRS)
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    demand(rope, {"rope_type": "default", "type": "default"})  # the second name is the older one
    heads, width = theirs["num_attention_heads"], theirs["hidden_size"]
    demand(theirs, {"head_dim": (width // heads, None)})
    return TransformerConfig(
        vocab_size=theirs["vocab_size"],
        max_length=theirs["max_position_embeddings"],
        d_model=width,
        n_layers=theirs["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=theirs.get("num_key_value_heads"),
        d_ff=theirs["intermediate_size"],
        norm="rmsnorm",
        norm_eps=theirs.get("rms_norm_eps", 1e-6),
        activation="swiglu",
        positions="rotary",
        rope_base=rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)),
        bias=False,
        tie_embeddings=theirs.get("tie_word_embeddings", False),
        attention_dropout=theirs.get("attention_dropout", 0.0),
        ffn_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
    )


def config_to_theirs(ours: TransformerConfig) -> dict[str, Any]:
    """The ``config.json`` from our settings."""
    return {
        "vocab_size": ours.vocab_size,
        "max_position_embeddings": ours.max_length,
        "hidden_size": ours.d_model,
        "num_hidden_layers": ours.n_layers,
        "num_attention_heads": ours.n_heads,
        "num_key_value_heads": ours.kv_heads,
        "intermediate_size": ours.ffn_width,
        "rms_norm_eps": ours.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": ours.rope_base},
        "tie_word_embeddings": ours.tie_embeddings,
        "attention_dropout": ours.attention_dropout,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def current_names(theirs: Weights) -> Weights:
    """Weights of older files under their names of today."""
    return theirs


def entries(config: TransformerConfig) -> list[Entry]:
    """Which weight is which."""
    keys, weight = config.kv_heads * config.head_dim, ["weight"]
    found = both("token_embedding", "model.embed_tokens", weight) + both("final_norm", "model.norm", weight)
    if not config.tie_embeddings:
        found += both("head", "lm_head", weight)
    for i in range(config.n_layers):
        here, there = f"blocks.{i}", f"model.layers.{i}"
        parts = tuple(f"{there}.self_attn.{name}_proj.weight" for name in "qkv")
        found.append(Entry(f"{here}.attention.sublayer.qkv.weight", parts, (config.d_model, keys, keys)))
        parts = tuple(f"{there}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        found.append(Entry(f"{here}.feed_forward.sublayer.gate_up.weight", parts, (config.ffn_width,) * 2))
        found += both(f"{here}.attention.norm", f"{there}.input_layernorm", weight)
        found += both(f"{here}.attention.sublayer.out", f"{there}.self_attn.o_proj", weight)
        found += both(f"{here}.feed_forward.norm", f"{there}.post_attention_layernorm", weight)
        found += both(f"{here}.feed_forward.sublayer.down", f"{there}.mlp.down_proj", weight)
    return found
