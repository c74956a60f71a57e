import pytest
import torch
from torch import nn

from helpers import MemoryLogger, TinyLM, loader
from lit_callbacks import ActivationStatsMonitor
from lit_callbacks._forward_observer import ForwardObserver
from lit_callbacks.functional import power_sums, rms_and_kurtosis


class Recorded(TinyLM):
    """Keeps what its blocks return."""

    def __init__(self):
        super().__init__()
        self.streams = [[], []]
        for i, block in enumerate(self.blocks):
            block.register_forward_hook(lambda module, args, output, i=i: self.streams[i].append(output.detach()))


def kurtosis(x):
    x = x.double().flatten()
    return (((x - x.mean()) ** 4).mean() / x.var(correction=0) ** 2 - 3).item()


def fit(make_trainer, module, **options):
    logger = MemoryLogger()
    monitor = ActivationStatsMonitor(**{"every_n_steps": 1, **options.pop("monitor", {})})
    trainer = make_trainer(callbacks=[monitor], logger=logger, **options)
    trainer.fit(module, loader())
    return logger


def test_moments_are_those_of_all_micro_batches_together(make_trainer):
    module = Recorded()
    logger = fit(make_trainer, module, max_steps=3, accumulate_grad_batches=2)
    for step, values in logger.calls:
        for i in range(2):
            stream = torch.cat(module.streams[i][2 * step : 2 * step + 2])
            assert values[f"residual/rms_blocks_{i}"] == pytest.approx(stream.square().mean().sqrt().item(), rel=1e-5)
            assert values[f"residual/max_blocks_{i}"] == stream.abs().max().item()
            assert values[f"residual/kurtosis_blocks_{i}"] == pytest.approx(kurtosis(stream), abs=1e-4)


def test_an_outlier_dimension_shows_in_the_kurtosis(make_trainer):
    module = Recorded()
    with torch.no_grad():
        module.embedding.weight[:, 3] *= 40
    (_, values), *_ = fit(make_trainer, module, max_steps=1).calls
    assert values["residual/kurtosis_blocks_1"] > 8
    assert values["residual/kurtosis_blocks_1"] == pytest.approx(kurtosis(module.streams[1][0]), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_power_sums_agree_with_float64(dtype):
    x = (torch.randn(50, 40) ** 3 + 0.5).to(dtype)
    rms, excess = rms_and_kurtosis(power_sums(x) + power_sums(2 * x))
    both = torch.cat([x, 2 * x])
    assert rms.item() == pytest.approx(both.double().square().mean().sqrt().item(), rel=1e-4)
    assert excess.item() == pytest.approx(kurtosis(both), rel=1e-3)


def test_a_glob_names_other_modules(make_trainer):
    logger = fit(make_trainer, TinyLM(), max_steps=1, monitor={"modules": "*.attention"})
    names = [f"residual/{stat}_blocks_{i}_attention" for i in range(2) for stat in ("rms", "kurtosis", "max")]
    assert list(logger.calls[0][1]) == names


@pytest.mark.parametrize("run", ["fit", "validate", "test"])
def test_a_glob_that_matches_nothing_is_refused(make_trainer, run):
    trainer = make_trainer(max_steps=1, callbacks=[ActivationStatsMonitor(modules="layers.*")])
    with pytest.raises(ValueError, match=r"modules must match .* TinyLM, got 'layers\.\*', .* embedding, blocks"):
        getattr(trainer, run)(TinyLM(), loader())


def test_a_model_without_blocks_gets_one_line(make_trainer):
    module = TinyLM()
    module.blocks = nn.ModuleList()
    with pytest.warns(UserWarning, match="found no numbered blocks that were called") as seen:
        fit(make_trainer, module, max_steps=3)
    assert sum("numbered blocks" in str(w.message) for w in seen) == 1


def test_what_a_block_returns_may_be_a_tuple_or_a_mapping(make_trainer):
    class Wraps(nn.Module):
        def __init__(self, block, wrap):
            super().__init__()
            self.block, self.wrap = block, wrap

        def forward(self, x):
            return self.wrap(self.block(x))

    class Unwraps(TinyLM):
        def loss(self, batch):
            for block in self.wrapping:
                block(self.embedding(batch["tokens"]))
            return super().loss(batch)

    module = Unwraps()
    wraps = [lambda x: (x, None), lambda x: {"hidden": x}, lambda x: None]
    module.wrapping = nn.ModuleList(Wraps(nn.Linear(16, 16), wrap) for wrap in wraps)
    (_, values), *_ = fit(make_trainer, module, max_steps=1).calls
    assert "residual/rms_wrapping_0" in values
    assert "residual/rms_wrapping_1" in values
    assert "residual/rms_wrapping_2" not in values


def test_manual_optimization_sees_the_forward_passes_until_the_first_step(make_trainer):
    class TwoForwards(TinyLM):
        """Two forward and backward passes, then a step, and a third forward pass after it."""

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            for _ in range(2):
                self.manual_backward(self.loss(batch))
            optimizer.step()
            self.loss(batch)

    seen = []

    class Counts(ForwardObserver):
        def __init__(self):
            super().__init__(1)

        def on_module(self, name, module, args, output):
            seen.append(name)

        def summarise(self, total):
            return {}

        def collected(self, trainer):
            return None

        def discard(self):
            pass

    make_trainer(max_steps=2, callbacks=[Counts()]).fit(TwoForwards(), loader())
    assert seen.count("blocks.0") == 2 * 2
