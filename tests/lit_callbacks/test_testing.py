import copy
import functools
import json
import math
import pickle
import struct
import sys
from collections import UserDict, namedtuple
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset

import helpers
from helpers import (
    MemoryLogger,
    OldTinyLM,
    TinyBlock,
    TinyLM,
    Tokens,
    TwoOptimizers,
    assert_identical,
    loader,
    snapshot,
)
from lit_callbacks import GradientNormLogger, NonFiniteGuard, SetupError, recommended
from lit_callbacks._member import Member
from lit_callbacks.testing import Fault, FaultInjector, InjectedDataError

pytestmark = pytest.mark.filterwarnings("ignore:step .* the gradient is not finite")


class Watch(Callback):
    """Calls functions of the module, the optimizer step and what the hook is given, in hooks they are named for."""

    def __init__(self, **hooks):
        for name, function in hooks.items():
            setattr(self, name, lambda trainer, module, *args, f=function: f(module, trainer.global_step, *args))


class Seer(LightningModule):
    """Remembers the batches it is given, and what its layers return, which does not depend on them."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
        self.batches, self.streams = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        streams = [torch.arange(8)]
        for layer in self.net:
            streams.append(layer(streams[-1]))
        self.streams.append([stream.detach() for stream in streams[1:]])
        return {"loss": streams[-1].square().mean(), "number": batch_idx}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(make_trainer, faults, module=None, data=None, callbacks=(), **options):
    """A run in which every fault fires as often as it should; the injector goes last, and is first nevertheless."""
    torch.manual_seed(0)
    module, injector = module or TinyLM(), FaultInjector(faults)
    trainer = make_trainer(callbacks=[*callbacks, injector], **{"max_steps": 6, **options})
    trainer.fit(module, loader() if data is None else data)
    injector.assert_all_fired()
    assert injector.fired == {fault: fault.n_steps for fault in faults}
    return module, trainer


def as_they_are(*batches):
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


def scaled(**options):
    scaler = torch.amp.GradScaler("cpu", **options)
    return {"plugins": [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]}


class Negative(TinyLM):
    """A negative loss, which times infinity would be the wrong infinity."""

    def loss(self, batch):
        return super().loss(batch) - 100


@pytest.mark.parametrize("kind", ["nan_loss", "inf_loss"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_fault_is_what_the_others_see(make_trainer, kind, accumulate):
    losses, guard = [], NonFiniteGuard()
    watch = Watch(on_before_backward=lambda module, step, loss: losses.append((step, loss.item())))
    options = {"callbacks": [guard, watch], "accumulate_grad_batches": accumulate}
    module, _ = fit(make_trainer, [Fault(kind, step=2, n_steps=2)], Negative(), **options)
    assert [step for step, _ in losses] == [step for step in range(6) for _ in range(accumulate)]
    faulty = [loss for step, loss in losses if step in (2, 3)]
    assert [repr(loss) for loss in faulty] == [kind[:3]] * 2 * accumulate
    assert all(math.isfinite(loss) for step, loss in losses if step not in (2, 3))
    assert guard.state_dict() == {"nonfinite": 2, "skipped_steps": 2, "in_a_row": 0}
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_loss_fault_ruins_an_unprotected_run(make_trainer):
    module, _ = fit(make_trainer, [Fault("inf_loss", step=2)])
    assert module.head.weight.isnan().all()


def test_a_loss_in_a_dictionary_keeps_its_company(make_trainer):
    outputs = []
    watch = Watch(on_train_batch_end=lambda module, step, output, *_: outputs.append(output))
    fit(make_trainer, [Fault("nan_loss", step=1)], Seer(), as_they_are(0, 1), callbacks=[watch], max_epochs=1)
    assert [(output["loss"].isnan().item(), output["number"]) for output in outputs] == [(False, 0), (True, 1)]


@pytest.mark.parametrize("kind", ["nan_gradient", "inf_gradient"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-true"}, {"scaled": 1}])
def test_a_gradient_fault_is_one_element_of_what_the_others_see(make_trainer, kind, options):
    found, logger = [], MemoryLogger()

    def look(module, step, optimizer):
        bad = {name: p.grad[~p.grad.isfinite()].tolist() for name, p in module.named_parameters()}
        found.append({name: values for name, values in bad.items() if values})

    callbacks = [GradientNormLogger(every_n_steps=1), Watch(on_before_optimizer_step=look)]
    options = {**(scaled(init_scale=1024.0) if "scaled" in options else options), "callbacks": callbacks}
    fit(make_trainer, [Fault(kind, step=2)], max_steps=3, logger=logger, **options)
    middle = "blocks.1.attention.weight"
    assert repr(found) == repr([{}, {}, {middle: [math.nan if kind == "nan_gradient" else math.inf]}])
    norms = logger.values("grad_norm/total")
    assert [math.isfinite(norm) for norm in norms.values()] == [True, True, False]


def test_a_gradient_fault_passes_over_frozen_parameters(make_trainer):
    module = TinyLM()
    module.blocks.requires_grad_(False)
    fit(make_trainer, [Fault("nan_gradient", step=1)], module, max_steps=2)
    assert [name for name, p in module.named_parameters() if p.isnan().any()] == ["hidden.weight"]


def test_a_scaler_skips_a_gradient_fault(make_trainer):
    precision = scaled(init_scale=1024.0)
    module, _ = fit(make_trainer, [Fault("nan_gradient", step=2, where="head.bias")], **precision)
    assert precision["plugins"][0].scaler.get_scale() == 512
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def is_nan(streams):
    return [stream.isnan().all().item() for stream in streams]


def test_an_activation_fault_is_all_that_a_module_returns(make_trainer):
    module, seen = Seer(), []
    hook = module.net[2].register_forward_hook(lambda module, args, output: seen.append(output.isnan().all().item()))
    fit(make_trainer, [Fault("nan_activation", step=1)], module, as_they_are(0, 1), max_epochs=1)
    hook.remove()
    assert is_nan(module.streams[1]) == [False, False, True, True], "the later half of four layers"
    assert seen == [False, True], "hooks see it too"


def test_an_activation_fault_is_in_all_micro_batches(make_trainer):
    options = {"accumulate_grad_batches": 2, "max_epochs": 1}
    fault = Fault("nan_activation", step=1, where="net.[13]")
    module, _ = fit(make_trainer, [fault], Seer(), as_they_are(*range(4)), **options)
    assert [is_nan(streams) for streams in module.streams] == [[False] * 4] * 2 + [[False, True, True, True]] * 2


def test_an_activation_fault_passes_over_layers_that_never_run(make_trainer):
    module = Seer()
    module.net[2].extra = nn.MultiheadAttention(4, 2)  # in the middle of the list
    fit(make_trainer, [Fault("nan_activation", step=0)], module, as_they_are(0), max_epochs=1)
    assert is_nan(module.streams[0]) == [False, False, False, True]


def test_an_activation_fault_in_a_layer_that_never_runs_does_not_fire(make_trainer):
    module = Seer()
    module.net[2].extra = nn.Linear(1, 1)
    with pytest.raises(AssertionError, match=r"nan_activation at step 0 \(0 of 1\)"):
        fit(make_trainer, [Fault("nan_activation", step=0, where="*.extra")], module, as_they_are(0), max_epochs=1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_activation_fault_in_a_checkpointed_block(make_trainer, reentrant):
    class Checkpointed(TinyLM):
        def loss(self, batch):
            for block in self.blocks:
                forward = functools.partial(TinyBlock.forward, block)
                block.forward = functools.partial(checkpoint, forward, use_reentrant=reentrant)
            return super().loss(batch)

    guard = NonFiniteGuard()
    fit(make_trainer, [Fault("nan_activation", step=2, where="blocks.0.attention")], Checkpointed(), callbacks=[guard])
    assert guard.state_dict()["skipped_steps"] == 1


def changed(make_trainer, fault, **options):
    """(name and index, new value, old value) of every weight that changes between a step and the next forward pass."""
    before, after = {}, {}

    def take(into):  # of several micro-batches, the first
        def look(module, step, *_):
            for name, parameter in module.named_parameters():
                into.setdefault((step, name), parameter.detach().clone())

        return look

    class Looks(TinyLM):
        def training_step(self, batch, batch_idx):
            take(after)(self, self.trainer.global_step)
            return super().training_step(batch, batch_idx)

    fit(make_trainer, [fault], Looks(), callbacks=[Watch(on_train_batch_start=take(before))], max_steps=4, **options)
    return {
        step: [
            (f"{name} {i}", new.item(), old.item())
            for (at, name), old_values in before.items()
            for i, (new, old) in enumerate(zip(after[at, name].flatten(), old_values.flatten(), strict=True))
            if at == step and not torch.equal(new, old) and not (new.isnan() and old.isnan())
        ]
        for step in range(4)
    }


def test_a_weight_fault_is_one_element_before_the_forward_pass(make_trainer):
    found = changed(make_trainer, Fault("nan_weight", step=2))
    ((name, new, old),) = found.pop(2)
    assert (name.split()[0], repr(new), math.isfinite(old)) == ("blocks.1.attention.weight", "nan", True)
    assert not any(found.values())
    ((name, *_),) = changed(make_trainer, Fault("nan_weight", step=3, where="*.bias"))[3]
    assert name.split()[0] == "hidden.bias"


def test_a_bit_flip_flips_bit_30_of_an_fp32_weight(make_trainer):
    ((name, new, old),) = changed(make_trainer, Fault("bit_flip", step=1, where="head.w*"), accumulate_grad_batches=2)[
        1
    ]
    assert name.split()[0] == "head.weight"
    (bits_old,), (bits_new,) = (struct.unpack("I", struct.pack("f", value)) for value in (old, new))
    assert bits_old ^ bits_new == 2**30
    assert new == old * 2.0**128


def test_a_bit_flip_flips_the_top_exponent_bit_of_a_bf16_weight(make_trainer):
    ((_, new, old),) = changed(make_trainer, Fault("bit_flip", step=1), precision="bf16-true")[1]
    assert new == old * 2.0**128


def test_a_bit_flip_at_two_steps_is_at_two_places(make_trainer):
    found = changed(make_trainer, Fault("bit_flip", step=1, n_steps=2, where="head.bias"))
    ((first, *_),), ((second, *_),) = found[1], found[2]
    assert first != second


def test_a_bit_is_flipped_once_in_a_step_of_several_batches(make_trainer):
    class Still(Seer):
        def training_step(self, batch, batch_idx):
            return 0 * self.net[2].bias.sum()

    module, options = Still(), {"max_epochs": 1, "accumulate_grad_batches": 2}
    before = copy.deepcopy(module.net.state_dict())
    fit(make_trainer, [Fault("bit_flip", step=0)], module, as_they_are(0, 1), **options)
    assert sum((module.net.state_dict()[name] != value).sum() for name, value in before.items()) == 1


def test_an_optimizer_state_fault_is_the_first_element_of_all_that_is_kept(make_trainer):
    found = []

    def look(module, step, *_):
        state = module.optimizers().state
        found.append({
            (name, key): value.isnan().nonzero().tolist()
            for name, p in module.named_parameters()
            for key, value in state[p].items()
            if value.isnan().any()
        })  # fmt: skip

    class Looks(TinyLM):
        def training_step(self, batch, batch_idx):
            look(self, batch_idx)
            return super().training_step(batch, batch_idx)

    fit(make_trainer, [Fault("nan_optimizer_state", step=2)], Looks(amsgrad=True), max_steps=3)
    keys = [("blocks.1.attention.weight", key) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
    assert found == [{}, {}, {key: [[0, 0]] for key in keys}]


def test_an_optimizer_without_a_state_is_refused(make_trainer):
    with pytest.raises(SetupError, match=r"nan_optimizer_state at step 1 finds nothing to strike: .*nothing"):
        fit(make_trainer, [Fault("nan_optimizer_state", step=1)], TinyLM(optimizer=torch.optim.SGD))


class Scheduled(TinyLM):
    """A rate that halves at every step, by multiplication; remembers the rate outside and within the step."""

    def __init__(self, **options):
        super().__init__(optimizer=torch.optim.SGD, lr=1.0, **options)
        self.outside, self.inside, self.errors = [], [], []

    def training_step(self, batch, batch_idx):
        self.outside.append(self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.inside.append(optimizer.param_groups[0]["lr"]))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_before_optimizer_step(self, optimizer):
        self.before = [(p.detach().clone(), p.grad.clone()) for p in self.parameters()]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if not self.trainer.fit_loop._should_accumulate():
            now = zip(self.parameters(), self.before, strict=True)
            self.errors.append(max((p - (old - self.inside[-1] * g)).abs().max().item() for p, (old, g) in now))


@pytest.mark.parametrize("options", [{}, {"scaled": True}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_learning_rate_fault_is_seen_by_the_step_alone(make_trainer, options):
    accumulate = options.get("accumulate_grad_batches", 1)
    options = scaled(init_scale=1024.0) if "scaled" in options else options
    faults = [Fault("learning_rate", step=1, n_steps=2, factor=3.0), Fault("learning_rate", step=2, factor=5.0)]
    module, trainer = fit(make_trainer, faults, Scheduled(), max_steps=4, **options)
    assert module.inside == [1.0, 3 * 0.5, 3 * 5 * 0.25, 0.125]
    assert max(module.errors) < 1e-6
    assert module.outside == [rate for rate in (1.0, 0.5, 0.25, 0.125) for _ in range(accumulate)]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0625


@pytest.mark.parametrize("first", [False, True])
def test_a_callback_that_changes_the_rate_for_the_step_too_does_not_leave_it_changed(make_trainer, first):
    class Halves(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            (group,) = optimizer.param_groups
            rate, group["lr"] = group["lr"], group["lr"] / 2

            def restore(*_):
                group["lr"] = rate

            self.hook = optimizer.register_step_post_hook(restore)

        def on_train_batch_end(self, *args):
            self.hook.remove()

    module, injector = Scheduled(), FaultInjector([Fault("learning_rate", step=1, factor=3.0)])
    callbacks = [Halves(), injector] if first else [injector, Halves()]
    trainer = make_trainer(max_steps=4, callbacks=callbacks)
    trainer.fit(module, loader())
    injector.assert_all_fired()
    assert module.inside == [0.5, 3 * 0.25, 0.125, 0.0625]
    assert module.outside == [1.0, 0.5, 0.25, 0.125]


def test_a_step_that_a_scaler_leaves_out_does_not_leave_the_rate_changed(make_trainer):
    faults = [Fault("learning_rate", step=2), Fault("nan_gradient", step=2)]
    module, injector = Scheduled(), FaultInjector(faults)
    trainer = make_trainer(max_steps=4, callbacks=[injector], **scaled(init_scale=1024.0))
    trainer.fit(module, loader())
    assert (module.inside, module.outside) == ([1.0, 0.5, 0.125], [1.0, 0.5, 0.25, 0.125])
    assert list(injector.fired.values()) == [0, 1]


def test_an_error_in_the_step_does_not_leave_the_rate_changed(make_trainer):
    class Breaks(Scheduled):
        def on_before_optimizer_step(self, optimizer):
            self.seen = optimizer, optimizer.param_groups[0]["lr"]
            raise KeyError("broken")

    module, injector = Breaks(), FaultInjector([Fault("learning_rate", step=0, factor=7.0)])
    with pytest.raises(KeyError):
        make_trainer(max_steps=2, callbacks=[injector]).fit(module, loader())
    optimizer, rate = module.seen
    assert (rate, optimizer.param_groups[0]["lr"]) == (7.0, 1.0)


def test_a_tensor_learning_rate_is_put_back_as_the_same_tensor(make_trainer):
    rate = torch.tensor(0.01)
    _, trainer = fit(make_trainer, [Fault("learning_rate", step=1)], TinyLM(lr=rate))
    assert trainer.optimizers[0].param_groups[0]["lr"] is rate
    assert rate == 0.01


def spoiled(make_trainer, fault, batch, **options):
    """What `training_step` is given at the fault. The data is not written to, and what comes next is as before."""
    data, of_others = [copy.deepcopy(batch) for _ in range(3)], []
    watch = Watch(on_train_batch_end=lambda module, step, output, batch, _: of_others.append(batch))
    options = {"callbacks": [watch], "max_epochs": 1, **options}
    module, _ = fit(make_trainer, [fault], Seer(), as_they_are(*data), **options)
    first, second, third = module.batches
    for kept in (first, third, *data, *of_others):
        torch.testing.assert_close(plain(kept), plain(batch), rtol=0, atol=0)
    assert type(second) is type(batch)
    return second


def plain(batch):
    return dict(batch) if isinstance(batch, UserDict) else batch


IDS = torch.tensor([[11, 12, 13, 14], [15, 16, 17, 18], [19, 20, 21, 22]])
Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize("key", ["labels", "targets", "target", "y"])
def test_labels_are_permuted_over_all_positions_that_count(make_trainer, key):
    labels = IDS.clone()
    labels[:, 3] = labels[1, 0] = -100
    batch = {"input_ids": IDS, key: labels, "attention_mask": torch.ones(3, 4, dtype=torch.long)}
    found = spoiled(make_trainer, Fault("shuffled_labels", step=1), batch)
    assert torch.equal(found["input_ids"], IDS)
    assert torch.equal(found[key] == -100, labels == -100)
    assert sorted(found[key].flatten().tolist()) == sorted(labels.flatten().tolist())
    assert (found[key] != labels).sum() >= 4
    assert any(set(new) != set(old) for new, old in zip(found[key].tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("kind", [tuple, list, Pair._make])
def test_labels_are_the_last_tensor_of_a_tuple(make_trainer, kind):
    x, y = torch.randn(6, 2), torch.arange(6)
    found = spoiled(make_trainer, Fault("shuffled_labels", step=1), kind([x, y]))
    assert torch.equal(found[0], x)
    assert not torch.equal(found[1], y)
    assert found[1].sort().values.equal(y)


def test_labels_have_their_names_in_a_tuple_too(make_trainer):
    batch = ({"x": torch.randn(6), "labels": torch.arange(6)}, torch.arange(6))
    named, last = spoiled(make_trainer, Fault("shuffled_labels", step=1), batch)
    assert not torch.equal(named["labels"], torch.arange(6))
    assert torch.equal(last, torch.arange(6))


def test_floating_point_labels_are_permuted_by_sample(make_trainer):
    y = torch.randn(6, 2)
    _, found = spoiled(make_trainer, Fault("shuffled_labels", step=1), (torch.randn(6, 2), y))
    assert not torch.equal(found, y)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, y.tolist()))


@pytest.mark.parametrize("kind", ["random_tokens", "constant_tokens"])
@pytest.mark.parametrize("make", [dict, UserDict])
def test_tokens_and_labels_that_are_tokens_are_replaced(make_trainer, kind, make):
    labels = IDS + 1
    labels[0] = -100
    others = {
        "sample_ids": torch.arange(3), "attention_mask": torch.ones(3, 4, dtype=torch.long),
        "token_type_ids": torch.zeros(3, 4, dtype=torch.long), "position_ids": torch.arange(4).expand(3, 4),
        "weights": torch.rand(3, 4), "padding": torch.zeros(3, 4, dtype=torch.bool), "number": 3,
    }  # fmt: skip
    batch = make({"input_ids": IDS, "targets": labels, **others})
    found = spoiled(make_trainer, Fault(kind, step=1), batch)
    torch.testing.assert_close({key: found[key] for key in others}, others, rtol=0, atol=0)
    assert (found["targets"] == -100).equal(labels == -100)
    if kind == "constant_tokens":
        assert set(found["input_ids"].flatten().tolist()) == {11}
        assert set(found["targets"][1:].flatten().tolist()) == {16}, "11 is none of the labels' ids"
    else:
        assert found["input_ids"].unique().numel() > 4
        assert 11 <= found["input_ids"].min() <= found["input_ids"].max() <= 22
        assert 16 <= found["targets"][1:].min() <= found["targets"].max() <= 23
    assert found["input_ids"].dtype == torch.int64


def test_constant_tokens_have_the_same_id_in_inputs_and_labels(make_trainer):
    tokens = torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
    batch = (tokens[:, 1:], tokens[:, :-1])
    x, y = spoiled(make_trainer, Fault("constant_tokens", step=1), batch)
    assert x.unique().tolist() == y.unique().tolist() == [tokens[0, 1].item()]


def test_random_tokens_leave_labels_of_classes_alone(make_trainer):
    x, y = spoiled(make_trainer, Fault("random_tokens", step=1), (IDS.int(), torch.arange(3)))
    assert x.dtype == torch.int32
    assert not torch.equal(x, IDS)
    assert torch.equal(y, torch.arange(3))


def test_a_batch_explodes_where_it_is_floating_point(make_trainer):
    mask = torch.ones(3, 1, 4, 4)
    batch = {"pixels": torch.randn(3, 2), "more": (torch.ones(3), IDS), "mask": mask}
    found = spoiled(make_trainer, Fault("exploding_batch", step=1, factor=64.0), batch)
    expected = {"pixels": batch["pixels"] * 64, "more": (torch.ones(3) * 64, IDS), "mask": mask}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_batch_of_tokens_explodes_behind_the_embedding(make_trainer):
    data = as_they_are(*[{"input_ids": IDS}] * 3)
    module, _ = fit(make_trainer, [Fault("exploding_batch", step=1, factor=8.0)], Seer(), data, max_epochs=1)
    first, second, third = module.streams
    assert torch.equal(second[0], first[0] * 8)
    assert torch.equal(second[1], module.net[1](second[0])), "there alone"
    assert torch.equal(third[0], first[0])


@pytest.mark.parametrize("kind", ["shuffled_labels", "random_tokens", "constant_tokens"])
def test_a_batch_without_what_a_fault_needs_is_refused(make_trainer, kind):
    match = rf"{kind} at step 0 finds nothing to change in a batch of pixels \[2\] torch.float32. Labels are"
    with pytest.raises(SetupError, match=match):
        fit(make_trainer, [Fault(kind, step=0)], Seer(), as_they_are({"pixels": torch.ones(2)}))


class Together(Dataset):
    """Reads a batch at a time."""

    def __len__(self):
        return 8

    def __getitems__(self, indices):
        return torch.tensor(indices, dtype=torch.float32)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_fault_is_raised_where_the_sample_is_read(make_trainer, workers):
    injector = FaultInjector([Fault("data_error", index=10, n_steps=2), Fault("data_error", index=10, rank=1)])
    data = Tokens()
    wrapped = injector.wrap(data)
    assert len(wrapped) == 64
    assert torch.equal(wrapped[10]["tokens"], data[10]["tokens"]), "nothing is raised outside of a fit"
    trainer = make_trainer(max_steps=8, callbacks=[injector])
    with pytest.raises(InjectedDataError, match="sample 10 cannot be read"):
        trainer.fit(TinyLM(), DataLoader(wrapped, batch_size=4, num_workers=workers))
    assert trainer.global_step <= 2
    assert list(injector.fired.values()) == [1, 0]
    assert wrapped[10]["index"] == 10


def test_a_data_fault_is_over_after_n_readings(make_trainer):
    class Stubborn(Dataset):
        def __init__(self, data):
            self.data, self.errors = data, 0

        def __len__(self):
            return len(self.data)

        def __getitem__(self, index):
            try:
                return self.data[index]
            except InjectedDataError:
                self.errors += 1
                return self[index]

    injector = FaultInjector([Fault("data_error", index=10, n_steps=3)])
    data = Stubborn(injector.wrap(Tokens()))
    for total in (3, 6):
        make_trainer(max_epochs=2, callbacks=[injector]).fit(TinyLM(), DataLoader(data, batch_size=4))
        injector.assert_all_fired()
        assert data.errors == total


def test_a_sample_that_was_not_read_can_be_read_after_the_run(make_trainer):
    injector = FaultInjector([Fault("data_error", index=60)])
    wrapped = injector.wrap(Tokens())
    make_trainer(max_steps=2, callbacks=[injector]).fit(TinyLM(), DataLoader(wrapped, batch_size=4))
    assert injector.fired == {Fault("data_error", index=60): 0}
    assert wrapped[60]["index"] == 60


def test_a_data_fault_strikes_datasets_that_read_a_batch_at_a_time(make_trainer):
    injector = FaultInjector([Fault("data_error", index=5)])
    data = DataLoader(injector.wrap(Together()), batch_size=2, collate_fn=lambda batch: batch)
    trainer = make_trainer(max_steps=8, callbacks=[injector])
    module = Seer()
    with pytest.raises(InjectedDataError):
        trainer.fit(module, data)
    assert torch.equal(module.batches[0], torch.tensor([0.0, 1.0]))


def test_a_data_set_without_indices_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match=r"dataset must be map-style, .* got Stream"):
        FaultInjector([]).wrap(Stream())


def test_what_did_not_fire_is_named(make_trainer):
    late = Fault("nan_loss", step=50)
    half = Fault("learning_rate", step=2, n_steps=2, factor=1.0)
    injector = FaultInjector([late, half, Fault("bit_flip", step=0), Fault("data_error", index=3, rank=4)])
    with pytest.raises(
        AssertionError, match=r"nan_loss at step 50 \(0 of 1\), .*, bit_flip at step 0 \(0 of 1\), data"
    ):
        injector.assert_all_fired()
    make_trainer(max_steps=3, callbacks=[injector]).fit(TinyLM(), loader())
    message = (
        "These faults did not fire as often as they should: nan_loss at step 50 (0 of 1), learning_rate at step 2 to 3 "
        "(1 of 2), data_error at sample 3 on rank 4 (0 of 1)"
    )
    with pytest.raises(AssertionError) as raised:
        injector.assert_all_fired()
    assert str(raised.value) == message
    assert injector.fired[half] == 1


def test_a_fault_of_another_rank_does_not_fire_here(make_trainer):
    torch.manual_seed(0)
    make_trainer(max_steps=3).fit(module := TinyLM(), loader())
    torch.manual_seed(0)
    injector = FaultInjector([Fault(kind, step=1, rank=1) for kind in ("nan_loss", "nan_weight", "learning_rate")])
    make_trainer(max_steps=3, callbacks=[injector]).fit(other := TinyLM(), loader())
    assert_identical([other.state_dict(), []], [module.state_dict(), []])
    assert set(injector.fired.values()) == {0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "nan_los", "step": 1}, "kind must be one of nan_loss, .*data_error, got 'nan_los'"),
        ({"kind": "nan_loss"}, "step must be at least 0 for nan_loss, got None"),
        ({"kind": "nan_loss", "step": -1}, "step must be at least 0 for nan_loss, got -1"),
        ({"kind": "nan_optimizer_state", "step": 0}, "step must be at least 1 for nan_optimizer_state, got 0"),
        ({"kind": "nan_loss", "step": 1, "index": 2}, "index must be None for nan_loss, got 2"),
        ({"kind": "data_error", "step": 1, "index": 2}, "step must be None for data_error, got 1"),
        ({"kind": "data_error"}, "index must be at least 0 for data_error, got None"),
        ({"kind": "nan_loss", "step": 1, "n_steps": 0}, "n_steps must be at least 1, got 0"),
        ({"kind": "nan_loss", "step": 1, "rank": -1}, "rank must be at least 0, got -1"),
        ({"kind": "learning_rate", "step": 1, "factor": math.nan}, "factor must be finite, got nan"),
        ({"kind": "nan_loss", "step": 1, "where": "head"}, "where must be None for nan_loss, got 'head'"),
        ({"kind": "nan_weight", "step": 1, "where": ""}, "where must be a glob for nan_weight, got ''"),
    ],
)
def test_bad_arguments_are_refused_by_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Fault(**arguments)


def test_equal_faults_are_refused():
    with pytest.raises(ValueError, match="faults must be different, got nan_loss at step 1 more than once"):
        FaultInjector([Fault("nan_loss", step=1), Fault("nan_loss", step=1)])


@pytest.mark.parametrize("kind", ["nan_activation", "bit_flip"])
def test_a_glob_that_matches_nothing_is_refused_before_training(make_trainer, kind):
    trainer = make_trainer(max_steps=3, callbacks=[FaultInjector([Fault(kind, step=2, where="decoder.*")])])
    with pytest.raises(SetupError, match=r"finds nothing to strike: where is 'decoder\.\*', and there is .*embedding"):
        trainer.fit(TinyLM(), loader())
    assert trainer.global_step == 0


def test_manual_optimization_has_all_but_faults_of_the_loss(make_trainer):
    with pytest.raises(SetupError, match="nan_loss changes what training_step returns"):
        fit(make_trainer, [Fault("nan_loss", step=2)], TwoOptimizers())
    faults = [Fault("learning_rate", step=3), Fault("nan_gradient", step=6), Fault("exploding_batch", step=4)]
    module, _ = fit(make_trainer, faults, TwoOptimizers(), max_steps=8)
    assert module.blocks[1].attention.weight.isnan().any()


EVERY = [
    Fault("shuffled_labels", step=1), Fault("random_tokens", step=1), Fault("exploding_batch", step=2, factor=1.5),
    Fault("learning_rate", step=2, factor=3.0), Fault("bit_flip", step=3, where="head.bias"),
    Fault("constant_tokens", step=3), Fault("nan_activation", step=4), Fault("nan_gradient", step=4),
    Fault("nan_optimizer_state", step=5), Fault("nan_loss", step=5),
]  # fmt: skip


def pairs():
    return DataLoader([{"tokens": t, "loss_factor": 1.0, "bad_gradient": False, "y": 0} for t in Tokens().tokens], 4)


def test_the_faults_of_a_second_run_are_the_same_and_leave_randomness_alone(make_trainer):
    def run(faults, seed=0):
        torch.manual_seed(0)
        module = TinyLM(dropout=0.1)
        injector = FaultInjector(faults, seed=seed)
        trainer = make_trainer(max_steps=4, callbacks=[injector])
        trainer.fit(module, pairs())
        return [*snapshot(module, trainer), torch.get_rng_state()]

    faults = EVERY[:6]
    *first, rng = run(faults)
    *second, second_rng = run(faults)
    *clean, clean_rng = run([])
    *other, _ = run(faults, seed=1)
    assert_identical(second, first)
    assert torch.equal(rng, second_rng)
    assert torch.equal(rng, clean_rng)
    for different in (clean, other):
        with pytest.raises(AssertionError):
            assert_identical(different, first)


def everything(module):
    """All hooks, and what the instance has in place of its class's methods."""
    hooks = [
        len(value) for m in [module, *module.modules()] for key, value in vars(m).items()
        if key.endswith("_hooks") and isinstance(value, dict)
    ]  # fmt: skip
    parameters = [len(p._backward_hooks or ()) for p in module.parameters()]
    globals_ = len(_global_optimizer_post_hooks)
    return hooks, parameters, globals_, "training_step" in vars(module)


@pytest.mark.parametrize("where", [None, "training_step", "on_after_backward", "on_train_batch_end"])
@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_nothing_is_left_behind(make_trainer, where, step):
    class Breaks(TinyLM):
        pass

    def fail(self, *args):
        if self.trainer.global_step >= step:
            raise KeyError("broken")
        return TinyLM.training_step(self, *args) if where == "training_step" else None

    if where is not None:
        setattr(Breaks, where, fail)
    module, injector = Breaks(), FaultInjector(EVERY)
    before, between = everything(module), []
    look = Watch(on_train_batch_end=lambda module, *_: between.append(everything(module)))
    trainer = make_trainer(max_steps=7, callbacks=[injector, look])
    try:
        trainer.fit(module, pairs())
        assert where is None
        injector.assert_all_fired()
    except KeyError:
        assert where is not None
    assert everything(module) == before
    assert between == [before] * trainer.global_step or where is not None
    assert injector.state_dict() == {}
    pickled = pickle.dumps(injector)
    assert b"Breaks" not in pickled
    assert pickle.loads(pickled).fired == injector.fired


def test_a_training_step_of_the_instance_is_put_back(make_trainer):
    module, calls = TinyLM(), []

    def own(batch):
        calls.append(batch)
        return module.loss(batch)

    module.training_step = own
    fit(make_trainer, [Fault("nan_loss", step=1)], module, max_steps=3)
    assert module.training_step is own
    assert len(calls) == 3


def test_a_decorated_training_step_gets_the_arguments_it_declares(make_trainer):
    def decorated(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args)

        return wrapper

    class Decorated(TinyLM):
        @decorated
        def training_step(self, batch):
            return self.loss(batch)

    fit(make_trainer, [Fault("nan_loss", step=1)], Decorated(), max_steps=3)


def test_every_fit_is_a_new_rehearsal(make_trainer):
    injector = pickle.loads(pickle.dumps(FaultInjector(EVERY)))
    for _ in range(2):
        make_trainer(max_steps=6, callbacks=[injector]).fit(TinyLM(), pairs())
        injector.assert_all_fired()
    trainer = make_trainer(max_steps=1, callbacks=[injector])
    trainer.fit(TinyLM(), pairs())
    assert set(injector.fired.values()) == {0}


@pytest.mark.filterwarnings("ignore:step 5. (the first non-finite value is the loss|not finite)")
@pytest.mark.parametrize(("package", "module"), [(lightning.pytorch, TinyLM), (pytorch_lightning, OldTinyLM)])
def test_a_rehearsal_with_the_recommended_callbacks(make_trainer, package, module):
    faults = [Fault("nan_loss", step=5), Fault("learning_rate", step=8, n_steps=3, factor=60.0)]
    module, trainer = fit(make_trainer, faults, module(), callbacks=recommended(), package=package, max_steps=12)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert next(type(c) for c in trainer.callbacks if isinstance(c, Member)) is FaultInjector


@pytest.mark.slow
def test_faults_of_one_rank_and_of_all(tmp_path):
    rank_0, rank_1 = helpers.two_ranks(__file__, tmp_path, "rank")
    assert rank_0["fired"] == {"nan_loss": 0, "nan_gradient": 0, "shuffled_labels": 1, "bit_flip": 1}
    assert rank_1["fired"] == {"nan_loss": 1, "nan_gradient": 1, "shuffled_labels": 1, "bit_flip": 1}
    for rank in (rank_0, rank_1):
        assert rank["finite"] == [True, False, True, False, True, False], "a bad gradient is averaged over ranks"
        assert rank["skipped"] == 3
        assert rank["weights"] == rank_0["weights"], "the same bit on all ranks"


def worker(out):
    """One of two processes: each leaves what it found in a file."""
    faults = [
        Fault("nan_loss", step=1, rank=1), Fault("nan_gradient", step=3, rank=1), Fault("shuffled_labels", step=4),
        Fault("bit_flip", step=5),
    ]  # fmt: skip
    torch.manual_seed(0)
    module, injector, guard, finite = TinyLM(), FaultInjector(faults), NonFiniteGuard(), []

    def look(module, step, optimizer):
        finite.append(all(bool(p.grad.isfinite().all()) for p in module.parameters()))

    callbacks = [Watch(on_before_optimizer_step=look), guard, injector]
    options = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2, "default_root_dir": out}
    trainer = helpers.make_trainer(max_steps=6, callbacks=callbacks, **options)
    trainer.fit(module, pairs())
    injector.assert_all_fired()
    facts = {
        "fired": {fault.kind: n for fault, n in injector.fired.items()}, "finite": finite,
        "skipped": guard.state_dict()["skipped_steps"],
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]).view(torch.int32).sum().item(),
    }  # fmt: skip
    (out / f"rank_{trainer.global_rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
