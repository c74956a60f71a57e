import math

import pytest
import torch

from lit_callbacks.functional import centered_mean, tensor_norms, total_norm


def reference(tensors):
    return math.sqrt(sum(float(x) ** 2 for t in tensors for x in t.double().flatten()))


def test_hand_numbers():
    assert total_norm([torch.tensor([1.0, 2.0]), torch.tensor([[2.0]])]).item() == 3.0


def test_no_tensors_have_norm_zero():
    assert total_norm([]).item() == 0.0
    assert total_norm([]).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_agrees_with_a_float64_loop(dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in [(17,), (3, 5), ()]]
    norm = total_norm(tensors)
    assert (norm.shape, norm.dtype) == ((), torch.float32)
    assert norm.item() == pytest.approx(reference(tensors), rel=1e-6)


def test_dtypes_mix_and_keep_their_order():
    tensors = [
        torch.tensor([3.0]),
        torch.tensor([4.0], dtype=torch.bfloat16),
        torch.tensor([5.0]),
        torch.zeros(2).half(),
    ]
    assert tensor_norms(tensors).tolist() == [3.0, 4.0, 5.0, 0.0]


def test_half_precision_neither_overflows_nor_underflows():
    large = [torch.full((1000,), 60000.0, dtype=torch.float16)]
    small = [torch.full((1000,), 1e-7, dtype=torch.float16)]
    assert total_norm(large).item() == pytest.approx(reference(large), rel=1e-6)
    assert total_norm(small).item() == pytest.approx(reference(small), rel=1e-6)
    assert reference(small) > 0


def test_long_bfloat16_sums_keep_their_precision():
    tensors = [torch.full((100_000,), 1.0, dtype=torch.bfloat16)]
    assert total_norm(tensors).item() == pytest.approx(math.sqrt(100_000), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_show(value):
    assert not total_norm([torch.ones(3), torch.tensor([1.0, value])]).isfinite()


def test_sparse_gradients_count_repeated_rows_once_summed():
    sparse = torch.sparse_coo_tensor([[1, 1]], [[1.0, 2.0], [2.0, 2.0]], (4, 2), check_invariants=True)
    assert total_norm([sparse]).item() == 5.0


def test_centered_mean_agrees_with_a_loop():
    values = torch.randn(30)
    expected = []
    for i in range(30):
        reach = min(i, 4)
        expected.append(values[i - reach : i + reach + 1].double().mean().item())
    torch.testing.assert_close(centered_mean(values, 4).tolist(), expected)


def test_centered_mean_leaves_non_finite_values_out():
    values = torch.tensor([math.nan, 1.0, math.inf, 3.0, 5.0])
    assert centered_mean(values, 1).tolist()[1:] == [1.0, 2.0, 4.0, 4.0]
    assert math.isnan(centered_mean(values, 1)[0])
