"""Our models from Hugging Face's weights, and back: GPT-2, LLaMA, BERT.

Needs neither transformers nor pickle: a folder is a ``config.json`` and a ``model.safetensors``.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_transformer.convert import bert, gpt2, llama
from lit_transformer.convert._names import Weights, demand, to_ours, to_theirs
from lit_transformer.nn import MaskedTransformer, Transformer

_KINDS: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama, "bert": bert}
Model = Transformer | MaskedTransformer


def from_hugging_face(config: dict[str, Any], weights: Weights) -> Model:
    """A model of ours that says the same.

    Args:
        config: Contents of their ``config.json``.
        weights: Their ``state_dict``.

    Raises:
        ValueError: If the kind of model, a setting or a weight is none that we have.
    """
    kind = _KINDS.get(config.get("model_type", ""))
    if kind is None:
        raise ValueError(f"expected model_type to be one of {', '.join(_KINDS)}, got {config.get('model_type')!r}")
    made, weights = kind.config_to_ours(config), kind.current_names(weights)
    model: Model = kind.MODEL(made)
    tied = ("lm_head.weight",) if made.tie_embeddings else ()
    ours = to_ours(kind.entries(made), weights, (*kind.IGNORED, *tied))
    if kind is bert and (name := "bert.embeddings.token_type_embeddings.weight") in weights:
        # Texts of one segment are all that there is here: its vector is added to every position.
        ours["encoder.positions.embedding.weight"] = ours["encoder.positions.embedding.weight"] + weights[name][0]
    own = model.state_dict()
    with torch.no_grad():
        for name, weight in ours.items():
            if own[name].shape != weight.shape:
                raise ValueError(f"expected {name} of {tuple(own[name].shape)}, got {tuple(weight.shape)}")
            own[name].copy_(weight)
    return model


def to_hugging_face(model: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Their ``config.json`` and ``state_dict`` of a model of ours.

    Raises:
        ValueError: If none of their models is like it; it names a setting that would have to be another.
    """
    candidates = {name: kind for name, kind in _KINDS.items() if type(model) is kind.MODEL}
    reasons = []
    for name, kind in candidates.items():
        try:
            shared = model.config.kv_heads != model.config.n_heads
            demand(vars(model.config) | {"n_kv_heads": model.config.kv_heads if shared else None}, kind.OURS)
            config = kind.config_to_theirs(model.config)
        except ValueError as error:
            reasons.append(f"as {name}: {error}")
            continue
        config |= {"model_type": name, "architectures": [kind.ARCHITECTURE]}
        weights = to_theirs(kind.entries(model.config), model.state_dict())
        config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        if kind is bert:
            segments = weights["bert.embeddings.word_embeddings.weight"].new_zeros(1, model.config.d_model)
            weights["bert.embeddings.token_type_embeddings.weight"] = segments
        return config, weights
    raise ValueError("; ".join(reasons) or f"{type(model).__name__} is like none of their models")


def load_hugging_face(folder: str | Path) -> Model:
    """Read a folder that ``save_pretrained`` has written.

    Raises:
        ValueError: If it has no ``config.json`` or ``model.safetensors``, or :func:`from_hugging_face` refuses them.
    """
    files = [Path(folder, name) for name in ("config.json", "model.safetensors")]
    if missing := [path for path in files if not path.is_file()]:
        raise ValueError(f"expected {missing[0].name} in {folder}, and there is none")
    return from_hugging_face(json.loads(files[0].read_text(encoding="utf-8")), load_file(files[1]))


def save_hugging_face(model: Model, folder: str | Path) -> None:
    """Write a folder that ``from_pretrained`` reads.

    Raises:
        ValueError: As :func:`to_hugging_face`.
    """
    config, weights = to_hugging_face(model)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


__all__ = ["from_hugging_face", "load_hugging_face", "save_hugging_face", "to_hugging_face"]
