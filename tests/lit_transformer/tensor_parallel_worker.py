"""Run by test_tensor_parallel.py in two processes: models that are cut against the same ones whole."""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lit_transformer.errors import UsageError
from lit_transformer.nn import EncoderDecoder, MaskedTransformer, Transformer, TransformerConfig
from lit_transformer.nn.classifier import DecoderClassifier
from lit_transformer.strategies.deferred import Draws
from lit_transformer.strategies.tensor_parallel import cut, reordered, stacked_orders

NO_DROPOUT = {"attention_dropout": 0, "ffn_dropout": 0, "residual_dropout": 0, "embedding_dropout": 0}
SHAPE = {"vocab_size": 11, "max_length": 8, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 24} | NO_DROPOUT
IDS = torch.arange(16).view(2, 8) % 11
MODELS = {
    "default": (Transformer, {}),
    "llama": (
        Transformer,
        {"n_kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": False},
    ),
    "normalised": (Transformer, {"qk_norm": True, "norm_placement": "sandwich", "embedding_norm": True}),
    "grouped_and_normalised": (Transformer, {"qk_norm": True, "n_kv_heads": 2, "tie_embeddings": False}),
    "rezero": (Transformer, {"norm_placement": "rezero", "activation": "geglu", "positions": "sinusoidal"}),
    "deepnorm": (Transformer, {"norm_placement": "deepnorm", "sliding_window": 3}),
    "checkpointed": (Transformer, {"activation_checkpointing": 1, "activation": "relu"}),
    "masked": (MaskedTransformer, {}),
    "encoder_decoder": (EncoderDecoder, {"qk_norm": True}),
    "classifier": (lambda config: DecoderClassifier(config, 3), {}),
}


def loss_and_gradients(model):
    inputs = (IDS, IDS) if isinstance(model, EncoderDecoder) else (IDS,)
    loss = model(*inputs).log_softmax(-1)[..., 1].mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def difference(make, options, mesh):
    """Of losses and gradients: the largest relative one; and whether all devices have the same gradients."""
    torch.manual_seed(0)
    config = TransformerConfig(**SHAPE | options)
    whole = make(config)
    for name, parameter in whole.named_parameters():
        if "gate" in name and parameter.numel() == 1:  # of ReZero, which begins as the identity
            torch.nn.init.ones_(parameter)
    parts = copy.deepcopy(whole)
    cut(parts, config, mesh, Draws())
    (loss, gradients), (expected_loss, expected) = loss_and_gradients(parts), loss_and_gradients(whole)
    orders = stacked_orders(parts)
    assert gradients.keys() == expected.keys()
    largest, held = abs(loss - expected_loss) / abs(expected_loss), 0
    for name, gradient in gradients.items():
        held += gradient.to_local().numel()
        found = reordered(gradient, orders[name].argsort()) if name in orders else gradient
        error = (found.full_tensor() - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        largest = max(largest, error.item())
    return {"difference": largest, "share": held / sum(p.numel() for p in whole.parameters())}


def refused(mesh):
    """What is said of models that cannot be cut."""
    found = {}
    for name, options in {"kv_heads": {"n_kv_heads": 1}, "d_ff": {"d_ff": 25}, "heads": {"n_heads": 1}}.items():
        config = TransformerConfig(**SHAPE | options)
        try:
            cut(Transformer(config), config, mesh, Draws())
        except UsageError as error:
            found[name] = str(error)
    return found


def main(out):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor_parallel",))
    found = {name: difference(make, options, mesh) for name, (make, options) in MODELS.items()}
    found["refused"] = refused(mesh)
    (out / f"cut_{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
