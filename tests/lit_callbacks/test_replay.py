import lightning.pytorch
import pytest
import torch
from lightning.pytorch import Callback
from torchmetrics import MeanMetric

from helpers import MemoryLogger, TinyLM, assert_identical, loader, snapshot
from lit_callbacks._replay import training_loss, without_trace
from lit_callbacks._window import Window


class Writer:
    """What hangs on a logger."""

    def __init__(self):
        self.written, self.summary, self.folder = [], {}, "folder"

    def add_scalar(self, key, value):
        self.written.append((key, value))


class WithExperiment(MemoryLogger):
    def __init__(self):
        super().__init__()
        self.experiment = Writer()


class Module(TinyLM):
    """Dropout, BatchNorm, a metric, and all ways to log; takes the tokens out of its batch, draws between batches."""

    def __init__(self):
        super().__init__(dropout=0.3, batch_norm=True)
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = self.loss({"tokens": batch.pop("tokens"), **batch})
        self.mean.update(loss)
        self.log("train/loss", loss)
        self.log_dict({"train/mean": self.mean}, on_step=False, on_epoch=True)
        for logger in self.loggers:
            if isinstance(logger, WithExperiment):
                logger.log_metrics({"by_hand": loss.item()}, step=batch_idx)
                logger.experiment.add_scalar(logger.experiment.folder + "/loss", loss.item())
                logger.experiment.summary["loss"] = loss.item()
        return {"loss": loss}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        torch.rand(1)


class Replays(Callback):
    """Runs every micro-batch of every step again, just before the step."""

    def __init__(self, how=None):
        self.how, self.first, self.again = how, [], []

    def on_train_start(self, trainer, pl_module):
        self.window = Window(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.window.start_batch(trainer, batch, batch_idx)

    def on_before_backward(self, trainer, pl_module, loss):
        self.window.record_loss(self, trainer, loss)
        self.first.append(loss.item() * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.how:
            with without_trace(trainer, pl_module):
                self.window.rewind()
                for micro_batch in self.window.micro_batches:
                    self.again.append(self.how(trainer, pl_module, micro_batch))


def forward(trainer, pl_module, micro_batch):
    with torch.no_grad():
        training_loss(trainer, pl_module, micro_batch)
        return training_loss(trainer, pl_module, micro_batch).item()


def backward(trainer, pl_module, micro_batch):
    loss = training_loss(trainer, pl_module, micro_batch)
    loss.backward()
    assert pl_module.head.weight.grad is not None
    return loss.item()


def fit(make_trainer, how, module=Module, wrap=lambda module: module, **options):
    torch.manual_seed(0)
    module, logger, callback = module(), WithExperiment(), Replays(how)
    trainer = make_trainer(callbacks=[callback], logger=logger, **{"max_epochs": 1, **options})
    trainer.fit(wrap(module), loader(n_samples=32))
    after = [*snapshot(module, trainer), torch.get_rng_state(), logger.calls, vars(logger.experiment)]
    return after, callback


@pytest.mark.parametrize("how", [forward, backward])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}], ids=str)
def test_a_run_with_replays_on_every_step_is_the_run_without(make_trainer, how, options):
    (*weights, rng, logged, written), plain = fit(make_trainer, None, **options)
    (*replayed_weights, replayed_rng, replayed_logged, replayed_written), callback = fit(make_trainer, how, **options)
    assert_identical(replayed_weights, weights)
    assert torch.equal(replayed_rng, rng)
    assert replayed_logged == logged
    assert replayed_written == written
    assert len(written["written"]) == 8
    assert callback.again == callback.first == plain.first, "the same dropout masks, in the same precision"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module, **how: torch.compile(module, **how),
        lambda module, **how: module.blocks[1].compile(**how) or module,
    ],
    ids=["whole", "in_place"],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_compiled_modules_run_eagerly_and_are_not_compiled_again(make_trainer, wrap):
    def count(frames):
        torch._dynamo.reset()
        return lambda module: wrap(module, backend=lambda graph, inputs: frames.append(graph) or graph, dynamic=False)

    frames, replayed_frames = [], []
    (*weights, rng, _, _), _ = fit(make_trainer, None, TinyLM, count(frames), max_steps=4)
    (*replayed, replayed_rng, _, _), callback = fit(make_trainer, backward, TinyLM, count(replayed_frames), max_steps=4)
    assert_identical(replayed, weights)
    assert torch.equal(replayed_rng, rng)
    assert callback.again == pytest.approx(callback.first)
    assert len(replayed_frames) == len(frames) > 0


def test_everything_is_put_back_when_the_inside_raises(make_trainer):
    class Breaks(Replays):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            pl_module.log_dict = own = lambda *args: None
            loggers = trainer.loggers
            gradients = {name: (p.grad, p.grad.clone()) for name, p in pl_module.named_parameters()}
            before, rng = snapshot(pl_module, trainer), torch.get_rng_state()
            with pytest.raises(KeyError):
                self.break_inside(trainer, pl_module)
            assert "log" not in vars(pl_module)
            assert pl_module.log_dict is own
            del pl_module.log_dict
            assert trainer.loggers is loggers
            assert pl_module.mean.update_count == trainer.global_step + 1
            for name, p in pl_module.named_parameters():
                assert p.grad is gradients[name][0]
                assert torch.equal(p.grad, gradients[name][1])
            assert_identical(snapshot(pl_module, trainer), before)
            assert torch.equal(torch.get_rng_state(), rng)
            self.checked = True

        def break_inside(self, trainer, pl_module):
            mean = pl_module.norm.running_mean.clone()
            with without_trace(trainer, pl_module):
                assert all(p.grad is None for p in pl_module.parameters())
                backward(trainer, pl_module, self.window.micro_batches[0])
                assert not torch.equal(pl_module.norm.running_mean, mean)
                raise KeyError

    callback = Breaks()
    make_trainer(max_steps=2, callbacks=[callback], logger=MemoryLogger()).fit(Module(), loader())
    assert callback.checked


def returns(output):
    class Sometimes(TinyLM):
        calls = 0

        def training_step(self, batch):
            self.calls += 1
            return self.loss(batch) if self.calls == 1 else output

    return Sometimes


@pytest.mark.parametrize("output", [None, {"logits": 1}, {"loss": None}], ids=str)
def test_a_step_without_a_loss_is_an_error(make_trainer, output):
    with pytest.raises(RuntimeError, match="returned no loss"):
        fit(make_trainer, forward, returns(output), max_steps=1)


def test_a_step_may_take_the_batch_alone(make_trainer):
    _, callback = fit(make_trainer, forward, returns(torch.tensor(2.0)), max_steps=1)
    assert callback.again == [2.0]


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_draws_its_own_batches_is_an_error(make_trainer):
    class Draws(TinyLM):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    with pytest.raises(RuntimeError, match="draws its own batches"):
        fit(make_trainer, forward, Draws, max_steps=1)


def test_a_stand_in_passes_for_the_logger_it_stands_for(make_trainer):
    class Asks(TinyLM):
        def training_step(self, batch, batch_idx):
            assert isinstance(self.logger, lightning.pytorch.loggers.Logger)
            assert (self.logger.name, self.logger.save_dir) == ("memory", None)
            assert self.logger.experiment.summary["a"] is not None
            with pytest.raises(AttributeError, match="'Writer' object has no attribute 'typo'"):
                _ = self.logger.experiment.typo
            return self.loss(batch)

    logger, callback = WithExperiment(), Replays(forward)
    logger.experiment.summary["a"] = {}
    make_trainer(max_steps=2, callbacks=[callback], logger=logger).fit(Asks(), loader())
    assert callback.again == callback.first
