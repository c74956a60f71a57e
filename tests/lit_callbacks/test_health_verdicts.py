"""How often the verdict is wrong, on made-up losses of the kinds that are easily taken for what they are not."""

from collections import Counter

import numpy as np
import pytest

from lit_callbacks.health import diagnose

SEEDS = 20


def wander(rng, n, deviation, likeness):
    """Noise whose neighbours are alike: autoregressive, of order 1."""
    noise = rng.normal(0, deviation * np.sqrt(1 - likeness**2), n)
    for i in range(1, n):
        noise[i] += likeness * noise[i - 1]
    return noise


def fall(rng, first, last, n, over, noise):
    """From the first level to the last one, exponentially."""
    return last + (first - last) * np.exp(-np.arange(n) / over) + rng.normal(0, noise, n)


def burst(rng):
    loss = fall(rng, 5, 2, 300, 30, 0.05)
    loss[279:291] += 4
    return loss


def ramp(n, height):
    return np.linspace(0, height, n)


# Name: values, steps between them, first step.
HEALTHY = {
    "10 noisy values": (lambda rng: rng.normal(2, 0.3, 10), 1, 0),
    "15 noisy values": (lambda rng: fall(rng, 3, 2, 15, 3, 0.2), 1, 0),
    "fine-tuning, every 50 steps": (lambda rng: fall(rng, 1.6, 1.0, 100, 2, 0.05), 50, 0),
    "fine-tuning, over at once": (lambda rng: fall(rng, 1.6, 1.0, 400, 0.8, 0.02), 50, 0),
    "fine-tuning that falls little": (lambda rng: fall(rng, 2.1, 2.0, 300, 30, 0.25), 1, 0),
    "classifier": (lambda rng: fall(rng, 0.7, 0.25, 150, 15, 0.1), 10, 0),
    "gone on with, on a plateau": (lambda rng: rng.normal(1, 0.03, 200), 10, 50_000),
    "in warm-up": (lambda rng: 7 - ramp(60, 0.06) + rng.normal(0, 0.01, 60), 1, 0),
    "25 steps": (lambda rng: 10.9 - ramp(25, 0.05) + rng.normal(0, 0.005, 25), 1, 0),
    "near 0": (lambda rng: np.abs(rng.normal(0.02, 0.01, 200)), 1, 0),
    "near 0, where it wanders": (lambda rng: fall(rng, 2, 0.02, 400, 20, 0) + abs(wander(rng, 400, 0.02, 0.97)), 1, 0),
    "a plateau that wanders": (lambda rng: fall(rng, 5, 2, 400, 30, 0) + wander(rng, 400, 0.2, 0.9), 1, 0),
    "a burst that is over": (burst, 1, 0),
    "heavy tails": (lambda rng: fall(rng, 5, 2, 200, 20, 0) + 0.1 * rng.standard_t(1.5, 200), 1, 0),
    "harder and harder data": (lambda rng: fall(rng, 5, 2, 300, 20, 0.03) + ramp(300, 0.25), 1, 0),
}  # fmt: skip
DIVERGING = {
    "9 values": lambda rng: np.array([3, 2.5, 2.2, 2, 5, 9, 20, 30, 40]) + rng.normal(0, 0.1, 9),
    "20 values": lambda rng: np.r_[3 - ramp(10, 1), 2 + ramp(10, 9)] + rng.normal(0, 0.1, 20),
    "a jump": lambda rng: np.r_[fall(rng, 5, 2, 200, 25, 0.06), rng.normal(6, 0.3, 60)],
    "a jump just now": lambda rng: np.r_[fall(rng, 5, 2, 200, 25, 0.06), rng.normal(6, 0.3, 15)],
    "a jump in noise": lambda rng: np.r_[fall(rng, 5, 2, 200, 25, 0.4), rng.normal(6, 0.6, 60)],
    "a slow rise": lambda rng: np.r_[fall(rng, 5, 2, 200, 25, 0.06), 2 + ramp(200, 2) + rng.normal(0, 0.1, 200)],
    "an explosion": lambda rng: np.r_[fall(rng, 5, 2, 100, 12, 0.06), 2 * np.exp(np.arange(30) / 8)],
    "from the first step": lambda rng: 2.3 + ramp(200, 4) + rng.normal(0, 0.05, 200),
}
FLAT = {
    "a language model": lambda rng: rng.normal(10.83, 0.1, 200),
    "characters": lambda rng: rng.normal(3.3, 0.08, 300),
    "two classes": lambda rng: rng.normal(0.693, 0.015, 150),
    "neighbours alike": lambda rng: 3 + wander(rng, 300, 0.04, 0.5),
    "a long run": lambda rng: rng.normal(7, 0.15, 1000),
    "without noise": lambda rng: np.full(200, 2.3026),
}


def verdicts(kind, values, every=1, begin=0):
    """Of one kind of loss, for all seeds."""
    losses = (values(np.random.default_rng((seed, *kind.encode()))) for seed in range(SEEDS))
    return Counter(
        diagnose({"train/loss": [(begin + every * i, float(v)) for i, v in enumerate(loss)]}, []).verdict
        for loss in losses
    )


def test_healthy_runs_are_called_healthy():
    found = {kind: verdicts(kind, *how) for kind, how in HEALTHY.items()}
    wrong = sum(counts.total() - counts["healthy"] for counts in found.values())
    assert wrong <= 0.02 * SEEDS * len(HEALTHY), found


@pytest.mark.parametrize(("verdict", "kinds"), [("diverging", DIVERGING), ("not learning", FLAT)])
def test_what_is_wrong_is_found(verdict, kinds):
    found = {kind: verdicts(kind, values) for kind, values in kinds.items()}
    assert sum(counts[verdict] for counts in found.values()) >= 0.95 * SEEDS * len(kinds), found
