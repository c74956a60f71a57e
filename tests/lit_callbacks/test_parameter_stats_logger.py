import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision

from helpers import MemoryLogger, TinyLM, TwoOptimizers, loader
from lit_callbacks import NonFiniteGuard, ParameterStatsLogger
from lit_callbacks._histograms import BINS, histogram

GROUPS = ["parameters"]


class Weights(Callback):
    """The reference: all weights in float64, before and after every step."""

    def __init__(self):
        self.before, self.after = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})

    def norm(self, step, accumulate=1):
        return flat(self.before[step * accumulate]).norm().item()

    def ratio(self, step, name=None, accumulate=1):
        before, after = self.before[step * accumulate], self.after[(step + 1) * accumulate - 1]
        names = before if name is None else [name]
        change = flat({n: after[n] - before[n] for n in names}).norm()
        return (change / flat({n: before[n] for n in names}).norm()).item()


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def fit(make_trainer, module=None, data=None, callbacks=(), **options):
    logger, weights = MemoryLogger(), Weights()
    stats = ParameterStatsLogger(every_n_steps=2, groups=options.pop("groups", GROUPS))
    trainer = make_trainer(logger=logger, callbacks=[stats, weights, *callbacks], **{"max_steps": 5, **options})
    trainer.fit(module or TinyLM(lr=0.05), data or loader())
    return logger, weights, trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.01},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 3},
        {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))]},
    ],
    ids=lambda options: str(list(options)),
)
def test_norms_and_true_steps(make_trainer, options):
    logger, weights, trainer = fit(make_trainer, **options)
    assert [step for step, _ in logger.calls] == [0, 2, 4]
    accumulate = options.get("accumulate_grad_batches", 1)
    for step, values in logger.calls:
        assert values["param_norm/total"] == pytest.approx(weights.norm(step, accumulate), rel=1e-5)
        assert values["update_ratio/total"] == pytest.approx(weights.ratio(step, None, accumulate), rel=1e-3)
        expected = weights.ratio(step, "head.weight", accumulate)
        assert values["update_ratio/head_weight"] == pytest.approx(expected, rel=1e-3)
    assert trainer.callback_metrics["param_norm/total"] == logger.calls[-1][1]["param_norm/total"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_weight_decay_and_momentum_are_in_the_step(make_trainer, optimizer):
    logger, weights, _ = fit(make_trainer, TinyLM(lr=0.1, optimizer=optimizer, weight_decay=0.5))
    for step, values in logger.calls:
        assert values["update_ratio/total"] == pytest.approx(weights.ratio(step), rel=1e-3)


def test_a_skipped_step_moves_nothing(make_trainer):
    logger, _, _ = fit(make_trainer, data=loader(faults={9: "nan"}), callbacks=[NonFiniteGuard()])
    assert logger.values("update_ratio/total")[2] == 0
    assert all(logger.values("update_ratio/total")[step] > 0 for step in (0, 4))


def test_a_step_that_the_scaler_skips_moves_nothing(make_trainer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows in fp16
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    logger, _, _ = fit(make_trainer, plugins=[plugin], max_steps=1)
    assert logger.values("update_ratio/total") == {0: 0.0}


def test_several_optimizers_have_their_own_keys(make_trainer):
    logger, _, _ = fit(make_trainer, TwoOptimizers(), max_steps=4)
    (_, first), (_, second) = logger.calls[:2]
    assert "update_ratio/embedding_weight_0" in first
    assert "update_ratio/head_weight_1" in second
    assert not any("head" in key for key in first)
    assert not any("embedding" in key for key in second)


def test_validation_reports_all_weights(make_trainer):
    module = TinyLM()
    (validated,) = make_trainer(callbacks=[ParameterStatsLogger()]).validate(module, loader(), verbose=False)
    norm = flat(dict(module.named_parameters())).norm().item()
    assert validated["param_norm/total"] == pytest.approx(norm, rel=1e-5)
    assert "param_norm/layer_1" in validated
    assert not any(key.startswith("update") for key in validated)


def test_a_glob_that_matches_nothing_stops_before_training(make_trainer):
    with pytest.raises(ValueError, match=r"groups must be 'layers', .* got 'encoder\.\*'"):
        fit(make_trainer, groups=["encoder.*"])


def test_the_copy_of_the_weights_is_gone_after_the_step(make_trainer):
    class Look(Callback):
        found = ()

        def on_train_batch_end(self, trainer, *args):
            self.found = [step.found for step in trainer.callbacks[0]._steps]

    stats, look = ParameterStatsLogger(every_n_steps=1), Look()
    trainer = make_trainer(callbacks=[stats, look], max_steps=3)
    trainer.fit(TinyLM(), loader())
    assert look.found == []
    assert stats._steps == []
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_histogram_counts_every_finite_value_and_never_hides_the_others():
    values = torch.randn(1000)
    found = histogram([values[:300], values[300:].view(7, 100), torch.tensor([math.nan, math.inf, -math.inf])])
    counts, edges = torch.histogram(values, BINS)
    torch.testing.assert_close(torch.tensor(found.counts), counts, rtol=0, atol=2)  # edges to a rounding
    torch.testing.assert_close(torch.tensor(found.edges, dtype=torch.float32), edges, rtol=1e-4, atol=1e-5)
    assert (sum(found.counts), found.nonfinite) == (1000, 3)
    assert found.total == pytest.approx(values.sum().item(), rel=1e-3)
    assert histogram([torch.full((5,), 2.0)]).counts[BINS // 2] == 5
    assert sum(histogram([torch.tensor([math.nan])]).counts) == 0


@pytest.mark.parametrize("fused", [False, True])
def test_tensorboard_gets_histograms_of_unscaled_gradients(make_trainer, tmp_path, fused):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.head = pl_module.head.weight.grad.clone() / (1024.0 if fused else 1.0)

    reference, memory = Gradients(), MemoryLogger()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = make_trainer(
        logger=[TensorBoardLogger(tmp_path, name="", version=""), memory],
        callbacks=[ParameterStatsLogger(groups=["head.*"], histograms=True), reference],
        plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)],
        max_steps=1,
    )
    trainer.fit(TinyLM(fused=fused), loader())
    events = reader.EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    assert set(events.Tags()["histograms"]) == {"param_histogram/head__", "grad_histogram/head__"}
    (event,) = events.Histograms("grad_histogram/head__")
    assert event.histogram_value.num == 32 * 32 + 32
    assert event.histogram_value.max >= reference.head.max().item()
    assert event.histogram_value.max < 1
    assert memory.calls[0][1]["grad_nonfinite/head__"] == 0


def test_nan_gradients_are_counted_beside_the_histogram(make_trainer):
    memory = MemoryLogger()
    stats = ParameterStatsLogger(groups=["hidden.weight", "head.weight"], histograms=True)
    data = loader(faults={1: "gradient"})
    make_trainer(logger=memory, callbacks=[stats, NonFiniteGuard()], max_steps=1).fit(TinyLM(), data)
    assert memory.values("grad_nonfinite/hidden_weight") == {0: 16 * 32}
    assert memory.values("grad_nonfinite/head_weight") == {0: 0}


def test_wandb_gets_histograms(make_trainer):
    logged = []

    class Recorded(WandbLogger):
        def __init__(self):
            self._prefix = ""

        experiment = name = version = save_dir = None

        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics))

        def log_hyperparams(self, *args):
            pass

        def finalize(self, status):
            pass

    wandb = pytest.importorskip("wandb")
    stats = ParameterStatsLogger(groups=["head.*"], histograms=True)
    make_trainer(logger=Recorded(), callbacks=[stats], max_steps=1).fit(TinyLM(), loader())
    shown = {key: value for _, values in logged for key, value in values.items() if "histogram" in key}
    assert set(shown) == {"param_histogram/head__", "grad_histogram/head__"}
    assert all(isinstance(value, wandb.Histogram) and sum(value.histogram) == 1056 for value in shown.values())
    assert all(step == 0 for step, _ in logged)


def test_without_a_logger_that_shows_them_the_last_histograms_are_a_picture(make_trainer, tmp_path):
    picture = tmp_path / "figures" / "histograms.png"
    plain, shown = ParameterStatsLogger(), ParameterStatsLogger(every_n_steps=1, histograms=True)
    make_trainer(callbacks=[plain], max_steps=2).fit(TinyLM(), loader())
    assert not picture.exists()
    make_trainer(callbacks=[shown], max_steps=2).fit(TinyLM(), loader())
    from matplotlib.image import imread

    height, width, _ = imread(picture).shape
    assert (width, height) == (960, 360)  # four in a row: weights and gradients of two layers and three kinds
    logger = TensorBoardLogger(tmp_path, name="board", version="")
    picture.unlink()
    make_trainer(callbacks=[shown], max_steps=2, logger=logger).fit(TinyLM(), loader())
    assert not list(tmp_path.rglob("histograms.png"))
