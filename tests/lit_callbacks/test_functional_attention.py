"""Against attention written out in float64, one row at a time."""

import math

import pytest
import torch

from lit_callbacks.functional import (
    ENTROPY_BINS,
    attention_statistics,
    histogram_quantile,
    softmax_statistics,
)

B, H, T, D = 2, 3, 13, 8


def reference(q, k, bias, valid=None):
    """Mean normalised entropy, mean attention to key 0 and largest logit of each head; `bias` is -inf where masked."""
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    logits = q.double() @ k.double().transpose(-2, -1) / q.size(-1) ** 0.5 + bias.double()
    logits = logits.expand(q.size(0), q.size(1), q.size(2), k.size(2))
    entropy, first, largest = [], [], []
    for head in range(q.size(1)):
        h, f, m = [], [], []
        for batch in range(q.size(0)):
            for row in range(q.size(2)):
                seen = logits[batch, head, row].isfinite()
                s = logits[batch, head, row][seen]
                if valid is not None and not valid[batch, row]:
                    continue
                if len(s):
                    m.append(s.max().item())
                if len(s) < 2:
                    continue
                p = s.softmax(0)
                h.append(-(p * p.clamp(min=1e-300).log()).sum().item() / math.log(len(s)))
                f.append(p[0].item() if seen[0] else 0.0)
        entropy.append(sum(h) / len(h))
        first.append(sum(f) / len(f))
        largest.append(max(m))
    return torch.tensor(entropy), torch.tensor(first), torch.tensor(largest), len(h)


def summary(statistics):
    rows, entropy, first = statistics.table[:, ENTROPY_BINS:].unbind(1)
    return entropy / rows, first / rows, statistics.largest, rows


def make(scale=1.0, key_heads=H, keys=T, dtype=torch.float32):
    q = torch.randn(B, H, T, D) * scale
    k = torch.randn(B, key_heads, keys, D) * scale
    return q.to(dtype), k.to(dtype)


def hidden(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)


CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
PADDED = torch.ones(B, 1, 1, T, dtype=torch.bool)
PADDED[0, ..., 9:] = False
ALIBI = -(torch.arange(T)[:, None] - torch.arange(T)).abs() * torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)
RELATIVE = torch.randn(1, H, T, T, generator=torch.Generator().manual_seed(1))
SLIDING = CAUSAL & ~torch.ones(T, T, dtype=torch.bool).tril(-4)

MASKS = {
    "none": (None, torch.zeros(T, T)),
    "causal, boolean": (CAUSAL, hidden(CAUSAL)),
    "causal, additive": (hidden(CAUSAL), hidden(CAUSAL)),
    "padding, boolean": (PADDED, hidden(PADDED)),
    "padding, smallest float": (torch.zeros(B, 1, 1, T).masked_fill(~PADDED, torch.finfo().min), hidden(PADDED)),
    "padding, -10000": (torch.zeros(B, 1, 1, T).masked_fill(~PADDED, -10000.0), hidden(PADDED)),
    "padding and causal": (PADDED & CAUSAL, hidden(PADDED & CAUSAL)),
    "sliding window": (SLIDING, hidden(SLIDING)),
    "ALiBi and causal": (ALIBI + hidden(CAUSAL), ALIBI + hidden(CAUSAL)),
    "relative bias": (RELATIVE, RELATIVE),
}


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0, 10.0], ids=lambda s: f"sharpness {s}")
@pytest.mark.parametrize("mask", MASKS)
def test_agrees_with_softmax_in_float64(mask, scale):
    q, k = make(scale)
    given, bias = MASKS[mask]
    valid = PADDED[:, 0, 0] if "padding" in mask else None
    entropy, first, largest, rows = summary(attention_statistics(q, k, given))
    expected = reference(q, k, bias, valid)
    torch.testing.assert_close(entropy, expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(first, expected[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(largest, expected[2], rtol=1e-5, atol=1e-5)
    assert rows.tolist() == [expected[3]] * H


def test_is_causal_is_the_causal_mask():
    q, k = make()
    for a, b in zip(attention_statistics(q, k, is_causal=True), attention_statistics(q, k, CAUSAL), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keys", [5, 29])
def test_cross_attention_and_causal_with_other_numbers_of_keys(keys):
    q, k = make(keys=keys)
    causal = torch.ones(T, keys, dtype=torch.bool).tril()
    entropy, _, largest, _ = summary(attention_statistics(q, k))
    torch.testing.assert_close(entropy, reference(q, k, torch.zeros(T, keys))[0], rtol=0, atol=1e-5)
    entropy, _, largest, rows = summary(attention_statistics(q, k, is_causal=True))
    expected = reference(q, k, hidden(causal))
    torch.testing.assert_close((entropy, largest), (expected[0], expected[2]), rtol=0, atol=1e-5)
    assert rows.tolist() == [expected[3]] * H


@pytest.mark.parametrize("key_heads", [1, 3])
def test_fewer_key_heads_than_query_heads(key_heads):
    q, k = torch.randn(B, 6, T, D), torch.randn(B, key_heads, T, D)
    entropy, *_ = summary(attention_statistics(q, k, is_causal=True))
    torch.testing.assert_close(entropy, reference(q, k, hidden(CAUSAL))[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_collapsed_attention_in_bfloat16_keeps_its_digits(autocast):
    q, k = make(scale=10.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        entropy, *_ = summary(attention_statistics(q, k, is_causal=True))
    expected = reference(q, k, hidden(CAUSAL))[0]
    assert expected.max() < 0.1
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-4)


def test_uniform_attention_is_one_and_one_hot_attention_is_zero():
    entropy, first, _, _ = summary(attention_statistics(torch.zeros(1, 1, T, D), torch.randn(1, 1, T, D)))
    assert entropy.item() == pytest.approx(1, abs=1e-6)
    assert first.item() == pytest.approx(1 / T)
    one_hot = torch.eye(D)[None, None] * 100
    entropy, _, largest, _ = summary(attention_statistics(one_hot, one_hot))
    assert entropy.item() == pytest.approx(0, abs=1e-6)
    assert largest.item() == pytest.approx(10000 / D**0.5)


def test_a_given_scale_counts():
    q, k = make()
    torch.testing.assert_close(
        attention_statistics(q, k, scale=2.0), attention_statistics(q * 2.0 * D**0.5, k)
    )  # fmt: skip


def test_rows_that_see_nothing_or_one_key_are_left_out():
    mask = torch.zeros(T, T, dtype=torch.bool)
    mask[0, :1] = True
    mask[5, :3] = True
    *_, rows = summary(attention_statistics(*make(), mask))
    assert rows.tolist() == [0.0] * H  # key 5 is seen by no query, so query 5 is taken for padding
    mask[6, 5:7] = mask[6, 0] = True
    entropy, _, largest, rows = summary(attention_statistics(*make(), mask))
    assert rows.tolist() == [2.0 * B] * H
    assert entropy.isfinite().all()
    assert largest.isfinite().all()


def test_many_blocks_give_what_one_does(monkeypatch):
    q, k = torch.randn(1, 2, 700, 8), torch.randn(1, 2, 700, 8)  # 980,000 logits, four blocks
    bias = hidden(torch.ones(700, 700, dtype=torch.bool).tril())
    entropy, first, largest, _ = summary(attention_statistics(q, k, is_causal=True))
    s = (q @ k.transpose(-2, -1) / 8**0.5 + bias).double()
    h = -(s.softmax(-1) * s.log_softmax(-1).nan_to_num(neginf=0)).sum(-1)[..., 1:] / torch.arange(2, 701).log()
    torch.testing.assert_close(entropy, h.mean((0, 2)).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(first, s.softmax(-1)[..., 1:, 0].mean((0, 2)).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(largest, s.amax((0, 2, 3)).float())


@pytest.mark.parametrize("mask", ["none", "causal, additive", "padding, smallest float", "ALiBi and causal"])
def test_softmax_statistics_are_those_of_the_scores(mask):
    q, k = make(2.0)
    given, _ = MASKS[mask]
    scores = q @ k.transpose(-2, -1) / D**0.5 + (0 if given is None else given)
    for a, b in zip(softmax_statistics(scores), attention_statistics(q, k, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    three = softmax_statistics(scores.flatten(0, 1))
    torch.testing.assert_close(three.table[0], softmax_statistics(scores).table.sum(0))


def test_histogram_counts_every_row_and_its_quantile_is_that_of_the_rows():
    q, k = torch.randn(4, 2, 200, 8) * 1.5, torch.randn(4, 2, 200, 8) * 1.5
    table = attention_statistics(q, k).table
    assert table[:, :ENTROPY_BINS].sum(1).tolist() == table[:, ENTROPY_BINS].tolist() == [800.0, 800.0]
    s = q @ k.transpose(-2, -1) / 8**0.5
    rows = -(s.softmax(-1) * s.log_softmax(-1)).sum(-1).transpose(0, 1).flatten(1) / math.log(200)
    for quantile in (0.05, 0.5, 0.95):
        expected = rows.quantile(quantile, dim=1)
        torch.testing.assert_close(histogram_quantile(table[:, :ENTROPY_BINS], quantile), expected, rtol=0, atol=0.01)


def test_values_that_are_not_numbers_show():
    q, k = make()
    q[0, 1, 3, 0] = math.nan
    entropy, _, largest, _ = summary(attention_statistics(q, k))
    assert entropy.isnan().tolist() == [False, True, False]
    assert largest.isnan().tolist() == [False, True, False]


def test_nothing_is_differentiated_and_nothing_is_changed():
    q, k = (x.requires_grad_() for x in make())
    scores = torch.randn(B, H, T, T, requires_grad=True) * 1.0
    before = scores.clone()
    assert not attention_statistics(q, k).table.requires_grad
    assert not softmax_statistics(scores).table.requires_grad
    torch.testing.assert_close(scores, before, rtol=0, atol=0)
