"""Sampling text from a model, one token at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_transformer.nn.transformer import Transformer


def sample(
    logits_V: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Draw one token id.

    Args:
        logits_V: Scores over the vocabulary, ``(V,)``.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep only the ``k`` most likely tokens (Fan et al. 2018).
        top_p: Keep only the most likely tokens whose probabilities reach ``p`` together, at least one (Holtzman et
            al. 2020). Applied after ``top_k``.
        generator: Source of randomness, on the CPU.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> sample(torch.tensor([0.0, 3.0, 1.0]), temperature=0)
        1
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return int(logits_V.argmax())
    probability, token = (logits_V.float().cpu() / temperature).softmax(-1).sort(descending=True)
    keep = len(probability) if top_k is None else min(top_k, len(probability))
    if top_p is not None:
        reached = probability[:keep].cumsum(0) / probability[:keep].sum()
        keep = min(keep, 1 + int((reached < top_p).sum()))
    return int(token[torch.multinomial(probability[:keep], 1, generator=generator)])


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse settings of :func:`sample` that are out of range."""
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}; 0 takes the most likely token")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; leave it out to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}; leave it out to keep every token")


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield new token ids, each as soon as it is known.

    The model sees the last ``max_length`` tokens at most. When its window is full, the window moves on by half its
    length, so that the cache is rebuilt rarely; with and without ``use_cache`` the windows, and so the results, are the
    same.

    Args:
        model: The language model, in eval mode.
        prompt: Token ids to go on from, at least one.
        max_new_tokens: How many to yield.
        temperature: See :func:`sample`.
        top_k: See :func:`sample`.
        top_p: See :func:`sample`.
        seed: Of the draw.
        use_cache: Keep keys and values of earlier tokens instead of computing them anew for each new one.

    Raises:
        ValueError: If the prompt is empty.
    """
    if not prompt:
        raise ValueError("the prompt must hold at least one token, got none")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    max_length = model.config.max_length
    tokens = list(prompt)
    start = max(0, len(tokens) - max_length)
    caches = model.make_caches() if use_cache else None
    fed = start  # tokens[start:fed] are in the cache
    for _ in range(max_new_tokens):
        if len(tokens) - start > max_length:
            start = fed = len(tokens) - max(1, max_length // 2)
            caches = model.make_caches() if use_cache else None
        ids = torch.tensor([tokens[fed if use_cache else start :]], device=device)
        logits = model(ids, caches)[0, -1]
        fed = len(tokens)
        tokens.append(sample(logits, temperature, top_k, top_p, generator))
        yield tokens[-1]
