import json
import math
import re

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers import TinyLM, TwoOptimizers, assert_identical, loader, says, snapshot
from lit_callbacks import NonFiniteGuard
from lit_callbacks._first_non_finite import Search
from lit_callbacks.non_finite_autopsy import NonFiniteAutopsy

BAD = 3  # the batch with a fault in it


class NaNBackward(torch.autograd.Function):
    """Harmless forward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


class Faulty(TinyLM):
    """Something is wrong with one of its modules, `where`, or with another part of it, in one batch."""

    def __init__(self, fault, where=None, times=math.inf, **options):
        super().__init__(**{"dropout": 0.1, "batch_norm": True, **options})
        self.fault, self.times, self.batch_idx = fault, times, -1
        if where is not None:
            self.get_submodule(where).register_forward_hook(self.spoil)

    def spoil(self, module, args, output):
        if self.batch_idx == BAD and self.times > 0:
            self.times -= 1
            return NaNBackward.apply(output) if self.fault == "backward" else output / 0
        return output

    def on_train_batch_start(self, batch, batch_idx):
        if self.fault == "parameter" and batch_idx == BAD:
            self.hidden.weight.data[2, 3] = math.nan

    def training_step(self, batch, batch_idx):
        self.batch_idx = batch_idx
        loss = self.loss(batch)
        if batch_idx != BAD:
            return loss
        if self.fault == "raises":
            self.fault = "raised"
            return loss * math.nan
        if self.fault == "raised":
            raise ZeroDivisionError("only the second time")
        if self.fault == "step":
            return loss + self.head(torch.full((1, 32), math.inf)).sum()
        if self.fault == "buffer" and self.norm.num_batches_tracked == BAD + 1:
            return loss * math.nan
        return loss * math.inf if self.fault == "loss" else loss


def fit(make_trainer, module, data=None, callbacks=(), max_reports=5, **options):
    torch.manual_seed(0)
    module = module()
    autopsy = NonFiniteAutopsy(max_reports)
    trainer = make_trainer(callbacks=[*callbacks, autopsy], **{"max_steps": BAD + 1, **options})
    trainer.fit(module, data or loader())
    return module, trainer, autopsy


def events(folder):
    written = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in written if event["event"] == "autopsy"]


@pytest.mark.parametrize(
    ("module", "phase", "where", "text"),
    [
        (lambda: Faulty("forward", "hidden"), "forward", "hidden", r"came out of hidden \(forward\), with input in \["),
        (lambda: Faulty("forward", "blocks.1"), "forward", "blocks.1", r"blocks\.1 \(forward\)"),
        (lambda: Faulty("forward", "embedding"), "forward", "embedding", r"weights in \[.*\], output in \[-inf, inf\]"),
        (lambda: Faulty("step"), "forward", "Faulty.training_step", r"step \(forward\) before it called head"),
        (lambda: Faulty("loss"), "loss", "loss", "is the loss, from finite outputs"),
        (lambda: Faulty("buffer"), "loss", "loss", "is the loss, from finite outputs"),
        (lambda: Faulty("parameter"), "parameter", "hidden.weight", r"not finite before .*\(0\.195 % not finite\)"),
        (lambda: Faulty("forward", "hidden", times=1), "finite", None, "the second time: suspect the hardware"),
        (lambda: Faulty("raises"), "failed", "Faulty.training_step", "training_step raised ZeroDivisionError: only"),
    ],
)  # fmt: skip
def test_the_source_is_named(make_trainer, tmp_path, module, phase, where, text):
    with says(rf"step 3: .*{text}"):
        _, trainer, _ = fit(make_trainer, module)
    assert trainer.global_step == BAD + 1
    (event,) = events(tmp_path)
    assert (event["step"], event["phase"], event.get("where"), event.get("rank")) == (3, phase, where, 0)
    assert re.search(text, event["text"])


@pytest.mark.parametrize("where", ["hidden", "blocks.1"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_bad_backward_pass_alone_is_traced_to_its_module(make_trainer, tmp_path, where, precision):
    with says("step 3: .*NaNBackwardBackward.*got such a gradient is embedding.weight"):
        # The clone that goes bad is the whole of the module, so that its node lies within it.
        fit(make_trainer, lambda: Inside("backward", where), precision=precision)
    (event,) = events(tmp_path)
    assert (event["phase"], event["where"], event["parameter"]) == ("backward", where, "embedding.weight")
    assert event["ranges"].keys() == {"gradient", "input", "weights"}
    assert all(found["nonfinite"] == 0 for found in event["ranges"].values())


class Inside(Faulty):
    """The fault is in the module's own forward."""

    def __init__(self, fault, where):
        super().__init__(fault)
        module = self.get_submodule(where)
        forward = module.forward
        module.forward = lambda x: self.spoil(module, x, forward(x))


@pytest.mark.parametrize("fault", ["nan", "inf"])
def test_a_bad_batch_is_named_with_its_key(make_trainer, tmp_path, fault):
    with says(r"step 1: the batch is not finite at batch\['loss_factor'\]"):
        fit(make_trainer, TinyLM, loader(faults={13: fault}), accumulate_grad_batches=2, max_steps=2)
    high = {"nan": 1.0, "inf": "inf"}[fault]
    low_to_high = {"nan": "[1, 1]", "inf": "[1, inf]"}[fault]
    assert events(tmp_path)[0] == {
        "step": 1, "event": "autopsy", "phase": "batch", "where": "batch['loss_factor']", "rank": 0, "batch_idx": 3,
        "ranges": {"values": {"low": 1.0, "high": high, "nonfinite": 0.25, "nan": fault == "nan"}},
        "text": f"the batch is not finite at batch['loss_factor'], with values in {low_to_high} (25 % not finite). "
        "Beyond the batch, the first non-finite value is the loss, from finite outputs.",
    }  # fmt: skip


@pytest.mark.parametrize("fault", ["nan", "gradient"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_guard_beside_it_skips_the_step_without_a_trace(make_trainer, tmp_path, fault, accumulate):
    def run(callbacks, **data):
        torch.manual_seed(0)
        module = TinyLM(dropout=0.1, batch_norm=True)
        trainer = make_trainer(max_epochs=1, callbacks=callbacks, accumulate_grad_batches=accumulate)
        trainer.fit(module, loader(**data))
        return snapshot(module, trainer)

    clean = run([], without=[4, 5] if accumulate == 2 else [5])
    for callbacks in ([NonFiniteGuard(), NonFiniteAutopsy()], [NonFiniteAutopsy(), NonFiniteGuard()]):
        with says("step .: the "):
            poisoned = run(callbacks, faults={21: fault})
        assert {type(c): c for c in callbacks}[NonFiniteGuard].state_dict()["skipped_steps"] == 1
        assert_identical(poisoned, clean)
    written = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert written == ["autopsy", "skip", "begin", "autopsy", "skip"], "whatever order they are passed in"


def test_nothing_is_repeated_beyond_the_first_bad_micro_batch(make_trainer, tmp_path):
    class Counts(TinyLM):
        steps = ()

        def training_step(self, batch, batch_idx):
            self.steps = (*self.steps, batch_idx)
            return self.loss(batch)

    with says("step 1: the batch"):
        module, *_ = fit(make_trainer, Counts, loader({21: "nan"}), accumulate_grad_batches=4, max_steps=2)
    assert module.steps == (0, 1, 2, 3, 4, 5, 6, 7, 4, 5)
    assert events(tmp_path)[0]["batch_idx"] == 5


def test_alone_it_changes_nothing(make_trainer):
    def run(callbacks):
        torch.manual_seed(0)
        module = TinyLM(dropout=0.1, batch_norm=True)
        make_trainer(max_epochs=1, callbacks=callbacks).fit(module, loader(faults={13: "gradient"}, n_samples=16))
        return [module.state_dict(), []], torch.get_rng_state()

    plain, rng = run([])
    with says("SqrtBackward0.*hidden.weight"):
        watched, watched_rng = run([NonFiniteAutopsy()])
    assert_identical(watched, plain)
    assert torch.equal(watched_rng, rng)
    assert watched[0]["hidden.weight"].isnan().all()
    assert watched[0]["head.weight"].isfinite().all()


def test_reports_end_at_the_limit_also_after_a_restart(make_trainer, tmp_path):
    data = loader(faults=dict.fromkeys(range(64), "nan"))
    with says("step .: the batch") as said:
        *_, autopsy = fit(make_trainer, TinyLM, data, [NonFiniteGuard()], max_reports=2)
    assert sum("batch is not finite" in line for line in said) == 2
    assert autopsy.state_dict() == {"reports": 2}
    resumed = NonFiniteAutopsy(2)
    resumed.load_state_dict(autopsy.state_dict())
    guard = NonFiniteGuard()
    make_trainer(max_steps=2, callbacks=[resumed, guard]).fit(TinyLM(), data)
    assert guard.state_dict()["skipped_steps"] == 2
    assert resumed.state_dict() == {"reports": 2}
    assert len(events(tmp_path)) == 2


def test_an_overflowing_scaler_is_left_to_its_search_but_a_bad_loss_is_not(make_trainer, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    plugins = [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]
    with says("step 3: .*hidden"):
        fit(make_trainer, lambda: Faulty("forward", "hidden"), plugins=plugins)
    assert scaler.get_scale() < 2.0**40
    assert [event["step"] for event in events(tmp_path)] == [3]


def test_a_gradient_whose_norm_overflows_is_not_blamed_on_the_hardware(make_trainer):
    class Huge(TinyLM):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) + 1e30 * self.head.bias.sum()

    with says(r"step 0: the gradient of head\.bias overflowed"):
        fit(make_trainer, Huge, max_steps=1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_through_activation_checkpoints(make_trainer, tmp_path, fault, reentrant):
    class Checkpointed(Inside):
        def __init__(self):
            super().__init__(fault, "blocks.1")
            block = self.blocks[1]
            forward = block.forward
            block.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)

    with says("step 3: .*blocks.1"):
        fit(make_trainer, Checkpointed)
    assert [(event["phase"], event["where"]) for event in events(tmp_path)] == [(fault, "blocks.1")]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_in_compiled_modules(make_trainer, tmp_path, fault):
    class Compiled(Inside):
        def __init__(self):
            super().__init__(fault, "blocks.1.attention")
            for block in self.blocks:
                block.compile(backend="eager")

    with says(r"step 3: .*blocks\.1\.attention"):
        fit(make_trainer, Compiled)
    assert [(event["phase"], event["where"]) for event in events(tmp_path)] == [(fault, "blocks.1.attention")]


def hooks(module):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()]


@pytest.mark.parametrize("fault", ["forward", "raises"])
def test_no_hooks_are_left(make_trainer, fault):
    before = hooks(Faulty(fault, "hidden"))
    with says("step 3"):
        module, _, autopsy = fit(make_trainer, lambda: Faulty(fault, "hidden"))
    assert hooks(module) == before
    assert autopsy._window is None


def test_manual_optimization_is_refused(make_trainer):
    with pytest.raises(ValueError, match="needs automatic optimization"):
        make_trainer(max_steps=1, callbacks=[NonFiniteAutopsy()]).fit(TwoOptimizers(), loader())


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_reports must be at least 1, got 0"):
        NonFiniteAutopsy(0)


def find(module, batch):
    search = Search(module)
    with search.forward():
        loss = module(batch["x"]).sum()
    search.backward(loss)
    return search.finding(batch, loss)


class Masked(nn.Module):
    """Puts out minus infinity where a mask says so."""

    def forward(self, x):
        return x.masked_fill(x < 0, -math.inf)


def test_minus_infinity_is_a_mask_and_only_mentioned():
    module = nn.Sequential(nn.Linear(2, 2), Masked(), nn.Softmax(-1), nn.Linear(2, 1))
    nn.init.constant_(module[0].weight, 1.0)
    found = find(module, {"x": -torch.ones(1, 2) * 9})
    assert (found.phase, found.where) == ("forward", "2")
    assert str(found).endswith("Before that, 1 put out -inf, as masks do.")


def test_a_batch_may_hold_minus_infinity():
    found = find(nn.Sequential(nn.Linear(2, 2)), {"x": torch.tensor([[-math.inf, 1.0]])})
    assert (found.phase, found.where) == ("forward", "0")
    assert "input in [-inf, 1] (50 % not finite)" in str(found)
    assert str(found).endswith("The batch holds -inf at batch['x'], as masks do.")


def test_gradients_that_overflow_where_they_meet_are_no_modules_fault():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(2, 2), nn.Hardtanh(), nn.Hardtanh()

        def forward(self, x):
            x = self.first(x)
            return 2e38 * self.a(x) + 2e38 * self.b(x)

    module = Twice()
    nn.init.constant_(module.first.weight, 0.01)
    nn.init.constant_(module.first.bias, -0.02)
    found = find(module, {"x": torch.ones(1, 2)})
    assert (found.phase, found.where) == ("backward", "first.weight")
    assert "overflowed where gradients are added up" in str(found)


class Missing(nn.Module):
    """Leaves out what is NaN."""

    def forward(self, x):
        return torch.where(x.isnan(), 0, x)


def test_what_does_no_harm_is_no_finding():
    module = nn.Sequential(nn.Dropout(0), Missing(), nn.Linear(2, 1))
    module.register_parameter("unused", nn.Parameter(torch.tensor(math.nan), requires_grad=False))
    assert find(module, {"x": torch.tensor([[math.nan, 1.0]])}).phase == "finite"


class Root(nn.Module):
    """Its gradient is infinite at 0."""

    def forward(self, x):
        return x.abs().sqrt()


class Branches(nn.Module):
    """Three modules of the same input, and a choice that hides a value but not its gradient."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.q, self.k, self.root = nn.Linear(2, 2), nn.Linear(2, 2), Root()

    def forward(self, x):
        x = self.first(x)
        roots = self.root(x)
        return torch.where(x == 0, 0 * self.q(x), roots) + self.k(x)


def test_of_modules_that_share_an_input_the_one_with_the_bad_gradient_is_named():
    found = find(Branches(), {"x": torch.zeros(1, 2)})
    assert (found.phase, found.where, found.parameter) == ("backward", "root", "first.weight")
    assert "(backward, SqrtBackward0), with gradient in [0, 0], input in [0, 0]" in str(found)


def test_frozen_weights_and_buffers_are_looked_at_too():
    norm = nn.BatchNorm1d(2)
    norm.running_var[0] = math.nan
    found = find(nn.Sequential(norm.eval()), {"x": torch.ones(1, 2)})
    assert (found.phase, found.where) == ("forward", "0")
    assert found.ranges["buffers"].nan
    frozen = nn.Linear(2, 2)
    frozen.weight.data[0] = math.nan
    found = find(nn.Sequential(nn.Linear(2, 2), frozen.requires_grad_(False)), {"x": torch.ones(1, 2)})
    assert (found.phase, found.where) == ("parameter", "1.weight")
