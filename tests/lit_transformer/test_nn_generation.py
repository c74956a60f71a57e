import math

import pytest
import torch

from lit_transformer.nn import Transformer, TransformerConfig, generate, sample


def make(**choices):
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=30, max_length=16, d_model=32, n_layers=2, n_heads=4, init="xavier", **choices
    )
    return Transformer(config).eval()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_cached_logits_equal_uncached_ones(positions, norm_placement):
    model = make(positions=positions, norm_placement=norm_placement)
    ids = torch.randint(30, (2, 12))
    whole = model(ids)
    caches = model.make_caches()
    pieces = [model(ids[:, :5], caches), model(ids[:, 5:6], caches), model(ids[:, 6:12], caches)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("prompt_length", [1, 7, 16, 40])
def test_generation_with_cache_equals_generation_without_also_past_the_window(positions, prompt_length):
    model = make(positions=positions)
    prompt = torch.randint(30, (prompt_length,)).tolist()
    cached = list(generate(model, prompt, 50, temperature=0.9, top_k=10, seed=3))
    uncached = list(generate(model, prompt, 50, temperature=0.9, top_k=10, seed=3, use_cache=False))
    assert cached == uncached
    assert len(cached) == 50


def test_generation_is_reproducible_and_depends_on_the_seed():
    model = make()
    assert list(generate(model, [1], 20, seed=1)) == list(generate(model, [1], 20, seed=1))
    assert list(generate(model, [1], 20, seed=1)) != list(generate(model, [1], 20, seed=2))


def test_tokens_are_yielded_one_by_one():
    stream = generate(make(), [1], 10**9)
    assert isinstance(next(stream), int)


def frequencies(n=4000, **settings):
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(n):
        counts[sample(logits, generator=generator, **settings)] += 1
    return counts / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampling_follows_the_tempered_softmax(temperature):
    expected = (torch.tensor([0.0, 1.0, 2.0, 3.0]) / temperature).softmax(0)
    torch.testing.assert_close(frequencies(temperature=temperature), expected, atol=0.03, rtol=0)


def test_temperature_zero_takes_the_most_likely():
    assert frequencies(n=50, temperature=0).tolist() == [0, 0, 0, 1]


def test_top_k_keeps_k_tokens_in_proportion():
    e = math.e
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0, 0, 1 / (1 + e), e / (1 + e)]), atol=0.03, rtol=0)


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    # Probabilities are 0.032, 0.087, 0.237, 0.644.
    assert (frequencies(n=500, top_p=0.6) > 0).tolist() == [False, False, False, True]
    assert (frequencies(n=500, top_p=0.7) > 0).tolist() == [False, False, True, True]
    assert (frequencies(n=2000, top_p=1.0) > 0).all()
    assert (frequencies(n=500, top_p=1e-6) > 0).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sample(torch.zeros(4), **settings)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(make(), [], 5))
