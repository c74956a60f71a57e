"""Models cut along heads and hidden units are the same models."""

from pathlib import Path

import pytest

from helpers import make_trainer, two_ranks
from lit_transformer.errors import UsageError
from lit_transformer.strategies import TensorParallel


def test_cut_models_have_the_loss_and_the_gradients_of_whole_ones(tmp_path):
    ranks = two_ranks(Path(__file__).with_name("tensor_parallel_worker.py"), tmp_path, "cut")
    for found in ranks:
        refused = found.pop("refused")
        assert len(found) == 10
        for name, model in found.items():
            assert model["difference"] < 1e-5, name
            assert 0.5 < model["share"] < 0.6, name  # half of the blocks; embeddings, norms and head whole
        for name, value in {"kv_heads": "n_kv_heads=1", "d_ff": "d_ff=25", "heads": "n_heads=1"}.items():
            assert f"must divide n_heads, n_kv_heads and d_ff of the model, got 2 and {value}" in refused[name]


def test_groups_that_do_not_fit_are_refused_by_the_trainer():
    with pytest.raises(UsageError, match="must divide the number of devices of a machine, got 4 and 2"):
        make_trainer(strategy=TensorParallel(4), devices=2)
    with pytest.raises(UsageError, match="got 2 and 1"):
        make_trainer(strategy="tensor_parallel", devices=1)
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 1, got 0"):
        TensorParallel(0)
