import gc
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers import TinyLM, assert_identical, loader, snapshot
from lit_callbacks import ActivationStatsMonitor, AttentionEntropyMonitor, DeadNeuronDetector, ThroughputLogger
from lit_callbacks._intercept import Interceptor, Listener, interceptor_of


class Ear(Listener):
    """Writes down what it is told."""

    def __init__(self, *functions):
        self.functions, self.calls, self.modules, self.ended = functions, [], [], 0

    def handlers(self):
        return dict.fromkeys(self.functions, self.calls.append)

    def on_module(self, name, module, args, output):
        self.modules.append(name)

    def on_end(self):
        self.ended += 1


class Net(nn.Module):
    """Calls relu in two modules, and in itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    def forward(self, x):
        return F.relu(self.inner(x))


def clean(module):
    hooks = [hook for m in module.modules() for hook in (*m._forward_hooks, *m._forward_pre_hooks)]
    return torch.overrides._len_torch_function_stack() == 0 and not hooks


def test_names_the_module_that_calls():
    net, ear, interceptor = Net(), Ear(F.relu), Interceptor()
    interceptor.add(ear, net)
    net(torch.randn(3, 2))
    interceptor.remove(ear)
    assert [(call.name, type(call.module).__name__) for call in ear.calls] == [("inner.1", "ReLU"), ("", "Net")]
    assert ear.modules == ["inner.0", "inner.1", "inner", ""]
    assert ear.ended == 1
    assert clean(net)


def test_many_listeners_share_one_mode_and_hear_only_what_they_asked_for():
    net, first, second, interceptor = Net(), Ear(F.relu), Ear(F.linear), Interceptor()
    for ear in (first, second, first):
        interceptor.add(ear, net)
    assert torch.overrides._len_torch_function_stack() == 1
    net(torch.randn(3, 2))
    interceptor.remove(first)
    net(torch.randn(3, 2))
    interceptor.remove(second)
    assert (len(first.calls), len(second.calls)) == (2, 2)
    assert clean(net)


def test_modules_of_others_are_not_heard():
    ear, interceptor = Ear(F.relu), Interceptor()
    interceptor.add(ear, Net())
    Net()(torch.randn(3, 2))
    interceptor.remove(ear)
    assert ear.modules == []
    assert {call.name for call in ear.calls} == {""}


def test_an_exception_inside_a_module_leaves_the_names_right():
    class Raises(nn.Module):
        def forward(self, x):
            raise KeyError("broken")

    class Catches(nn.Module):
        def __init__(self):
            super().__init__()
            self.bad, self.good = nn.Sequential(Raises()), nn.ReLU()

        def forward(self, x):
            try:
                self.bad(x)
            except KeyError:
                return self.good(x)

    net, ear, interceptor = Catches(), Ear(F.relu), Interceptor()
    interceptor.add(ear, net)
    net(torch.randn(2))
    net(torch.randn(2))
    interceptor.remove(ear)
    assert [call.name for call in ear.calls] == ["good", "good"]


class Compiled(TinyLM):
    """Its blocks are compiled by a backend that counts."""

    def __init__(self, frames, **options):
        super().__init__(**options)

        def backend(graph, inputs):
            frames.append(graph)
            return graph.forward

        for block in self.blocks:
            block.compile(backend=backend, dynamic=False)


class Stances(Callback):
    """Which stance the compiler has during each forward pass."""

    def __init__(self):
        self.seen = []

    def on_before_backward(self, *args):
        self.seen.append(torch._dynamo.eval_frame._stance.stance)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
def test_compiled_modules_run_eagerly_on_measured_steps_and_are_not_compiled_again(make_trainer):
    frames, stances = [], Stances()
    watch = [AttentionEntropyMonitor(3), DeadNeuronDetector(3, window_tokens=1), ActivationStatsMonitor(3)]
    module = Compiled(frames)
    trainer = make_trainer(max_steps=12, callbacks=[stances, *watch])
    trainer.fit(module, loader())
    assert watch[0]._past.values.keys() == {f"blocks.{i}, head {h}" for i in range(2) for h in range(2)}
    assert all(len(values) == 4 for values in watch[0]._past.values.values())
    assert stances.seen == ["default" if step % 3 else "force_eager" for step in range(12)]
    assert torch._dynamo.eval_frame._stance.stance == "default"

    without = []
    torch.manual_seed(0)
    make_trainer(max_steps=12).fit(Compiled(without), loader())
    assert len(frames) == len(without) > 0, "as many compilations as without callbacks"


def test_the_stance_of_the_user_is_restored(make_trainer):
    with torch.compiler.set_stance("fail_on_recompile"):
        make_trainer(max_steps=2, callbacks=[AttentionEntropyMonitor(1)]).fit(TinyLM(), loader())
        assert torch._dynamo.eval_frame._stance.stance == "fail_on_recompile"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_nothing_twice(make_trainer, use_reentrant):
    class Checkpointed(TinyLM):
        def __init__(self):
            super().__init__()
            for block in self.blocks:
                inner = block.forward
                block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=use_reentrant)

    def run(module):
        torch.manual_seed(0)
        monitor, stats = AttentionEntropyMonitor(1), ActivationStatsMonitor(1)
        rows = []
        monitor.record = lambda trainer, pl_module, step, values: rows.append(values)
        trainer = make_trainer(max_steps=3, callbacks=[monitor, stats])
        trainer.fit(module, loader())
        return rows, snapshot(module, trainer)

    torch.manual_seed(0)
    plain, state = run(TinyLM())
    torch.manual_seed(0)
    rows, checkpointed = run(Checkpointed())
    assert rows == plain
    assert_identical(checkpointed, state)


@pytest.mark.parametrize("where", ["training_step", "backward", "validation_step"])
def test_an_exception_in_fit_leaves_no_mode_and_no_stance_behind(make_trainer, where):
    class Breaks(TinyLM):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            if where == "training_step" and batch_idx == 1:
                raise KeyError(where)
            if where == "backward" and batch_idx == 1:
                loss.register_hook(lambda gradient: {}[where])
            return loss

        def validation_step(self, batch, batch_idx):
            if where == "validation_step":
                raise KeyError(where)

    torch.compiler.reset()
    callbacks = [AttentionEntropyMonitor(1), DeadNeuronDetector(1), ActivationStatsMonitor(1), ThroughputLogger(1)]
    trainer = make_trainer(max_epochs=1, callbacks=callbacks)
    module = Breaks()
    with pytest.raises(KeyError, match=where):
        trainer.fit(module, loader(n_samples=12), loader(n_samples=8))
    assert clean(module)
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_nothing_is_open_off_cadence(make_trainer):
    class Look(Callback):
        def __init__(self):
            self.open = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.open.append(not clean(pl_module))

    look = Look()
    trainer = make_trainer(max_steps=7, callbacks=[AttentionEntropyMonitor(3), DeadNeuronDetector(3), look])
    trainer.fit(TinyLM(), loader())
    assert look.open == [True, False, False, True, False, False, True]


def test_the_interceptor_goes_with_its_trainer(make_trainer):
    trainer = make_trainer(max_steps=1, callbacks=[AttentionEntropyMonitor(1)])
    trainer.fit(TinyLM(), loader())
    alive = weakref.ref(interceptor_of(trainer))
    del trainer
    gc.collect()
    assert alive() is None
