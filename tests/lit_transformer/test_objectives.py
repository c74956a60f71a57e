"""Losses by hand and against torch: z-loss, weights, and means over what counts."""

import math

import pytest
import torch
from torch.nn import functional as F

from lit_transformer.objectives import ClassObjective, TokenObjective


def logits(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), requires_grad=True)


def test_z_loss_is_the_squared_log_of_the_denominator():
    scores = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0], [9.0, 9.0]]])
    targets = torch.tensor([[0, 0, -100]])
    squares = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    plain = (math.log(2) + math.log(4 / 3)) / 2
    assert float(TokenObjective(z_loss=0.1).loss(scores, targets)) == pytest.approx(plain + 0.1 * squares)
    found = ClassObjective(2, z_loss=0.1).loss(scores[0], targets[0])
    assert float(found) == pytest.approx(plain + 0.1 * squares)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}])
def test_a_weight_of_two_is_a_sample_twice(settings):
    scores, targets = logits(3, 4, 7), torch.tensor([[0, 1, 2, -100], [3, 4, -100, -100], [5, 6, 0, 1]])
    twice = [0, 1, 1, 2]
    for objective, some, labels in (
        (TokenObjective(**settings), scores, targets),
        (ClassObjective(7, **settings), scores[:, 0], targets[:, 0]),
    ):
        weighted = objective.loss(some, labels, torch.tensor([1.0, 2.0, 1.0]))
        torch.testing.assert_close(weighted, objective.loss(some[twice], labels[twice]))
    labels = torch.randint(2, (3, 7)).float()
    weighted = ClassObjective(7, multi_label=True).loss(scores[:, 0], labels, torch.tensor([1.0, 2.0, 1.0]))
    torch.testing.assert_close(
        weighted, F.binary_cross_entropy_with_logits(scores[:, 0].detach()[twice], labels[twice])
    )


@pytest.mark.parametrize("weights", [None, torch.zeros(2)])
@pytest.mark.parametrize("objective", [TokenObjective(z_loss=0.1), TokenObjective(), ClassObjective(5)])
def test_where_nothing_counts_the_loss_is_zero_and_moves_nothing(objective, weights):
    scores = logits(2, 3, 5) if isinstance(objective, TokenObjective) else logits(2, 5)
    targets = torch.full(scores.shape[:-1], -100)
    loss = objective.loss(scores, targets, weights)
    loss.backward()
    assert loss.item() == 0.0
    assert not scores.grad.any()


def test_a_batch_without_targets_leaves_the_metrics_as_they_are():
    for objective, shape in ((TokenObjective(), (2, 3, 5)), (ClassObjective(5), (2, 5))):
        scores = logits(*shape).detach()
        targets = torch.randint(5, scores.shape[:-1], generator=torch.Generator().manual_seed(1))
        objective.update(scores, targets)
        before = {name: float(metric.compute()) for name, metric in objective.metrics().items()}
        objective.update(scores, torch.full_like(targets, -100))
        after = {name: float(metric.compute()) for name, metric in objective.metrics().items()}
        assert before == after
        assert all(map(math.isfinite, after.values()))


def test_classes_that_do_not_count_are_left_out():
    scores, targets = logits(4, 5), torch.tensor([1, -100, 3, -100])
    torch.testing.assert_close(ClassObjective(5).loss(scores, targets), F.cross_entropy(scores, targets))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenObjective(z_loss=-1.0), r"z_loss must be at least 0, got -1\.0"),
        (lambda: ClassObjective(3, multi_label=True, z_loss=0.1), r"z_loss=0\.1 and multi_label do not go together"),
    ],
)
def test_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
