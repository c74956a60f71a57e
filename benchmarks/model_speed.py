"""How fast is the model itself? A step against Hugging Face's GPT-2 and nanoGPT, and generation with a cache.

Both sides have the same shape, batch and dropout, and take turns in one process; forward, backward and a fused AdamW
step, process CPU time, one thread. Printed are medians of the paired ratios with their quartiles. nanoGPT's `model.py`
is not part of this project: name a checkout of it.

    python benchmarks/model_speed.py [--nanogpt DIR]    # some five minutes on one core
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from lit_transformer.nn import Transformer, TransformerConfig, generate

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH, BATCH = 4, 256, 8, 4096, 256, 4
Logits = Callable[[Tensor], Tensor]


def ours(activation: Any) -> tuple[nn.Module, Logits]:
    """This project's, with the other side's activation."""
    config = TransformerConfig(
        vocab_size=VOCABULARY, max_length=LENGTH, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS,
        activation=activation, ffn_dropout=0.0,
    )  # fmt: skip
    model = Transformer(config)
    return model, model


def hugging_face() -> tuple[nn.Module, Logits]:
    """Hugging Face's GPT-2."""
    shape = {"n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, use_cache=False))
    return model.train(), lambda ids: model(input_ids=ids).logits


def nanogpt(folder: Path) -> tuple[nn.Module, Logits]:
    """The model of nanoGPT."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {"block_size": LENGTH, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "vocab_size": VOCABULARY}
    model = module.GPT(module.GPTConfig(**shape, dropout=0.1, bias=True))
    return model, lambda ids: model(ids, ids)[0]


def stepper(made: tuple[nn.Module, Logits]) -> Callable[[Tensor], float]:
    """A training step that returns its CPU time in seconds."""
    model, logits = made
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(ids: Tensor) -> float:
        start = time.process_time()
        loss = nn.functional.cross_entropy(logits(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - start

    return step


def compare(name: str, other: tuple[nn.Module, Logits], activation: str, steps: int) -> None:
    """Take turns, the first of each pair changing."""
    sides = [stepper(ours(activation)), stepper(other)]
    ratios = []
    for i in range(steps + 3):
        ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
        order = (0, 1) if i % 2 else (1, 0)
        times = {side: sides[side](ids) for side in order}
        if i >= 3:
            ratios.append(times[0] / times[1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"a step against {name}: {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {steps} pairs)", flush=True)


def generation(new_tokens: int = 256, repeats: int = 3) -> None:
    """With and without a cache, taking turns."""
    model = Transformer(TransformerConfig(vocab_size=VOCABULARY, max_length=512, d_model=WIDTH, n_layers=LAYERS)).eval()
    ratios = []
    for _ in range(repeats):
        times = []
        for use_cache in (False, True):
            start = time.process_time()
            list(generate(model, [1] * 32, new_tokens, use_cache=use_cache))
            times.append(time.process_time() - start)
        ratios.append(times[0] / times[1])
    print(f"{new_tokens} new tokens without a cache: {statistics.median(ratios):.1f} times as long as with one")


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    compare("Hugging Face's GPT-2", hugging_face(), "gelu_tanh", options.steps)
    if options.nanogpt is not None:
        compare("nanoGPT", nanogpt(options.nanogpt), "gelu", options.steps)
    generation()


if __name__ == "__main__":
    main()
