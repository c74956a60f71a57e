"""BERT (Devlin et al. 2019), with its head for hidden tokens."""

from typing import Any

from lit_transformer.convert._names import UNSCALED, Entry, Weights, both, demand
from lit_transformer.nn import MaskedTransformer, TransformerConfig

MODEL = MaskedTransformer
ARCHITECTURE = "BertForMaskedLM"
IGNORED = (
    "bert.embeddings.position_ids",
    "bert.embeddings.token_type_embeddings.weight",  # added to the positions, see before_ours
    "bert.pooler.*",
    "cls.predictions.decoder.*",
    "cls.seq_relationship.*",
)
OURS: dict[str, object] = {
    "norm_placement": "post",
    "norm": "layernorm",
    "positions": "learned",
    "bias": True,
    "embedding_norm": True,
    "tie_embeddings": True,
    "activation": ("gelu", "gelu_tanh", "relu", "silu"),
    "n_kv_heads": None,
    "qk_norm": False,
    "sliding_window": None,
    "init": UNSCALED,
}
_THEIRS = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "tie_word_embeddings": True,
    "hidden_act": ("gelu",),  # also in the head, where ours is the exact GELU
}


def config_to_ours(theirs: dict[str, Any]) -> TransformerConfig:
    """Our settings from the ``config.json``."""
    demand(theirs, _THEIRS)
    dropout = theirs.get("hidden_dropout_prob", 0.1)
    return TransformerConfig(
        vocab_size=theirs["vocab_size"],
        max_length=theirs["max_position_embeddings"],
        d_model=theirs["hidden_size"],
        n_layers=theirs["num_hidden_layers"],
        n_heads=theirs["num_attention_heads"],
        d_ff=theirs["intermediate_size"],
        norm_placement="post",
        norm_eps=theirs.get("layer_norm_eps", 1e-12),
        activation="gelu",
        embedding_norm=True,
        attention_dropout=theirs.get("attention_probs_dropout_prob", 0.1),
        ffn_dropout=0.0,
        residual_dropout=dropout,
        embedding_dropout=dropout,
    )


def config_to_theirs(ours: TransformerConfig) -> dict[str, Any]:
    """The ``config.json`` from our settings."""
    demand(vars(ours), {"activation": "gelu"})
    return {
        "vocab_size": ours.vocab_size,
        "max_position_embeddings": ours.max_length,
        "hidden_size": ours.d_model,
        "num_hidden_layers": ours.n_layers,
        "num_attention_heads": ours.n_heads,
        "intermediate_size": ours.ffn_width,
        "layer_norm_eps": ours.norm_eps,
        "hidden_act": "gelu",
        "attention_probs_dropout_prob": ours.attention_dropout,
        "hidden_dropout_prob": ours.residual_dropout,
        "type_vocab_size": 1,
        "pad_token_id": None,
    }


def current_names(theirs: Weights) -> Weights:
    """Weights of older files under their names of today: norms once had gamma and beta."""
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    renamed = {}
    for name, weight in theirs.items():
        tail = ".".join(name.split(".")[-2:])
        renamed[name.removesuffix(tail) + old.get(tail, tail)] = weight
    return renamed


def entries(config: TransformerConfig) -> list[Entry]:
    """Which weight is which."""
    found = [
        *both("encoder.token_embedding", "bert.embeddings.word_embeddings", ["weight"]),
        *both("encoder.positions.embedding", "bert.embeddings.position_embeddings", ["weight"]),
        *both("encoder.embedding_norm", "bert.embeddings.LayerNorm"),
        *both("head.dense", "cls.predictions.transform.dense"),
        *both("head.norm", "cls.predictions.transform.LayerNorm"),
        Entry("head.output.bias", ("cls.predictions.bias",)),
    ]
    for i in range(config.n_layers):
        here, there = f"encoder.blocks.{i}", f"bert.encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = tuple(f"{there}.attention.self.{name}.{kind}" for name in ("query", "key", "value"))
            found.append(Entry(f"{here}.attention.sublayer.qkv.{kind}", parts, (config.d_model,) * 3))
        found += both(f"{here}.attention.sublayer.out", f"{there}.attention.output.dense")
        found += both(f"{here}.attention.norm", f"{there}.attention.output.LayerNorm")
        found += both(f"{here}.feed_forward.sublayer.up", f"{there}.intermediate.dense")
        found += both(f"{here}.feed_forward.sublayer.down", f"{there}.output.dense")
        found += both(f"{here}.feed_forward.norm", f"{there}.output.LayerNorm")
    return found
