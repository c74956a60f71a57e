"""Each planted mistake is found, good recipes are not spoken of, and modules that nobody here wrote are read."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from lightning.pytorch import LightningModule
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau, SequentialLR
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from helpers import make_trainer
from hf_models import save_bert
from lit_callbacks import GradualUnfreezing, RecipeCheck
from lit_callbacks.recipe import IDS, data_rules, finding, learning_rates, optimization_rules
from lit_callbacks.recipe.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")

STEPS = 40


def samples(n, seed=0, length=8):
    return torch.randint(16, (n, length), generator=torch.Generator().manual_seed(seed))


class Tokens(torch.utils.data.Dataset):
    """Random tokens with labels."""

    def __init__(self, n=160, seed=0, ignore=False):
        self.x = samples(n, seed)
        self.ignore = ignore

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        labels = torch.full_like(self.x[i], -100) if self.ignore else self.x[i].roll(-1)
        return {"input_ids": self.x[i], "labels": labels}


class Model(LightningModule):
    """A small transformer with a good recipe, in which one thing can be wrong."""

    def __init__(self, post_norm=False, dropout=0.0, extra=None):
        super().__init__()
        self.embed = nn.Embedding(16, 16)
        self.attention = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, norm_first=not post_norm)
        self.head = nn.Linear(16, 16)
        self.extra = extra

    def training_step(self, batch, batch_idx):
        logits = self.head(self.attention(self.embed(batch["input_ids"])))
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def groups(self, wrong=False):
        decays = [p for p in self.parameters() if p.ndim > 1 and p is not self.embed.weight and p.requires_grad]
        rest = [p for p in self.parameters() if (p.ndim < 2 or p is self.embed.weight) and p.requires_grad]
        return [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.1 if wrong else 0.0}]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.groups(), lr=1e-3)
        return with_warmup(optimizer)


def with_warmup(optimizer, steps=3):
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def optimized(make):
    """The model with another ``configure_optimizers``."""
    return type("Other", (Model,), {"configure_optimizers": make})


def found(tmp_path, module, train=None, val=None, steps=1, **options):
    """The ids of what is found before the first step."""
    check = RecipeCheck(**{"not_learning_after": 10**6, **options.pop("check", {})})
    train = DataLoader(Tokens(), 4, shuffle=True) if train is None else train
    callbacks = [check, *options.pop("beside", [])]
    settings = {"max_steps": STEPS, "gradient_clip_val": 1.0, "callbacks": callbacks, "default_root_dir": tmp_path}
    trainer = make_trainer(**{**settings, **options})
    stop_after(trainer, steps)
    trainer.fit(module, train, val)
    return {f.id for f in check.findings}


def stop_after(trainer, steps):
    from lightning.pytorch import Callback

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= steps

    trainer.callbacks.append(Stop())


def test_a_good_recipe_is_not_spoken_of(tmp_path):
    assert found(tmp_path, Model(), val=DataLoader(Tokens(40, seed=1), 4)) == set()


def no_schedule(self):
    return torch.optim.AdamW(self.groups(), lr=1e-3)


def long_warmup(self):
    return with_warmup(torch.optim.AdamW(self.groups(), lr=1e-3), 20)


def decay_everywhere(self):
    return with_warmup(torch.optim.AdamW(self.groups(wrong=True), lr=1e-3))


def coupled(self):
    return with_warmup(torch.optim.Adam(self.groups(), lr=1e-3))


def high_rate(self):
    return with_warmup(torch.optim.AdamW(self.groups(), lr=0.5))


def zero_rate(self):
    return with_warmup(torch.optim.AdamW(self.groups(), lr=0.0))


def left_out(self):
    groups = self.groups()
    groups[0]["params"] = groups[0]["params"][:-1]
    return with_warmup(torch.optim.AdamW(groups, lr=1e-3))


@pytest.mark.parametrize(
    ("expected", "module"),
    [
        ("no-warmup", optimized(no_schedule)()),
        ("post-ln-without-warmup", optimized(no_schedule)(post_norm=True)),
        ("warmup-length", optimized(long_warmup)()),
        ("decay-on-norms", optimized(decay_everywhere)()),
        ("coupled-decay", optimized(coupled)()),
        ("lr-range", optimized(high_rate)()),
        ("lr-zero", optimized(zero_rate)()),
        ("parameters-left-out", optimized(left_out)()),
        ("high-dropout", Model(dropout=0.4)),
        ("batchnorm", Model(extra=nn.BatchNorm1d(16))),
    ],
)
def test_a_planted_mistake_is_found_and_nothing_else(tmp_path, expected, module):
    assert found(tmp_path, module) == {expected}


def test_clipping(tmp_path):
    assert found(tmp_path, Model(), gradient_clip_val=None) == {"no-clipping"}


def test_bf16_parameters_with_a_long_second_moment(tmp_path):
    assert found(tmp_path, Model(), precision="bf16-true") == {"adam-precision"}


@pytest.mark.parametrize(("rate", "expected"), [(2e-5, {"adam-precision"}), (1e-3, set())])
def test_bf16_parameters_that_are_too_large_to_move(tmp_path, rate, expected):
    def slowly(self):
        return with_warmup(torch.optim.AdamW(self.groups(), lr=rate, betas=(0.9, 0.95)))

    module = optimized(slowly)()
    nn.init.normal_(module.embed.weight, std=0.02)
    assert found(tmp_path, module, precision="bf16-true") == expected


def test_what_the_rule_says_of_bf16_is_so():
    """Of weights from 0.001 to 1, an update of 2e-5 moves those below 512 times that, and no other."""
    weights = nn.Parameter(torch.logspace(-3, 0, 2000, dtype=torch.bfloat16).view(1, -1))
    before = weights.detach().clone()
    optimizer = torch.optim.SGD([weights], lr=2e-5)
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    stay = optimization_rules._share_that_stays([before], 2e-5)
    assert 0.6 < stay < 0.7
    assert torch.equal(weights[before > 512 * 2e-5], before[before > 512 * 2e-5])
    assert (weights[before < 256 * 2e-5] != before[before < 256 * 2e-5]).all()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_nothing_trainable(tmp_path):
    class Frozen(Model):
        def configure_optimizers(self):
            self.requires_grad_(False)
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            return None

    assert "nothing-trainable" in found(tmp_path, Frozen(), max_epochs=1, steps=0)


class OfHuggingFace(LightningModule):
    def __init__(self):
        super().__init__()
        tokens = {"bos_token_id": 0, "eos_token_id": 0}
        config = hf.GPT2Config(vocab_size=16, n_positions=8, n_embd=16, n_layer=1, n_head=2, **tokens)
        self.model = hf.GPT2LMHeadModel(config)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    def configure_optimizers(self):
        decays = [p for n, p in self.named_parameters() if p.ndim > 1 and "wte" not in n and "wpe" not in n]
        rest = [p for p in self.parameters() if all(p is not d for d in decays)]
        groups = [{"params": decays}, {"params": rest, "weight_decay": 0.0}]
        return with_warmup(torch.optim.AdamW(groups, lr=1e-3))


def test_tied_weights(tmp_path):
    assert found(tmp_path, OfHuggingFace()) == set()
    broken = OfHuggingFace()
    broken.model.lm_head.weight = nn.Parameter(broken.model.lm_head.weight.detach().clone())
    assert "tied-weights-broken" in found(tmp_path, broken)


@pytest.mark.parametrize(
    ("expected", "train", "val"),
    [
        ("shuffle-off", DataLoader(Tokens(), 4), None),
        ("labels-ignored", DataLoader(Tokens(ignore=True), 4, shuffle=True), None),
        ("validation-in-training", DataLoader(Tokens(), 4, shuffle=True), DataLoader(Subset(Tokens(), range(20)), 4)),
    ],
)
def test_mistakes_in_the_data(tmp_path, expected, train, val):
    assert found(tmp_path, Model(), train, val, num_sanity_val_steps=0) == {expected}


def test_overlapping_subsets(tmp_path):
    data = Tokens()
    train, val = Subset(data, range(100)), Subset(data, range(90, 120))
    loaders = DataLoader(train, 4, shuffle=True), DataLoader(val, 4)
    assert found(tmp_path, Model(), *loaders) == {"validation-in-training"}
    loaders = DataLoader(train, 4, shuffle=True), DataLoader(Subset(data, range(100, 120)), 4)
    assert found(tmp_path, Model(), *loaders) == set()


class OpensLate(Tokens):
    """Opens something at the first sample, as people do with HDF5 files."""

    opened = False

    def __getitem__(self, i):
        self.opened = True
        return super().__getitem__(i)


def test_data_sets_are_read_through_a_copy(tmp_path):
    train, val = OpensLate(), OpensLate(20, seed=1)
    trainer = make_trainer(max_steps=0, default_root_dir=tmp_path)
    plan = SimpleNamespace(
        trainer=trainer, train_loaders=[DataLoader(train)], val_loaders=[DataLoader(Subset(val, range(10)))]
    )
    assert not list(data_rules.validation_in_training(plan))
    assert not train.opened
    assert not val.opened


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`")
def test_streams_are_not_indexed(tmp_path):
    class Stream(IterableDataset):
        def __len__(self):
            return 160

        def __iter__(self):
            yield from (Tokens()[i] for i in range(160))

    assert found(tmp_path, Model(), DataLoader(Stream(), 4), DataLoader(Stream(), 4)) == set()


def test_a_rule_that_cannot_be_asked_is_said_and_stops_nothing(tmp_path, monkeypatch, caplog):
    def unreadable(plan):
        raise OSError("no such file")
        yield

    monkeypatch.setitem(finding._RULES, "labels-ignored", ("error", unreadable))
    assert found(tmp_path, Model()) == {"labels-ignored"}
    assert "note labels-ignored: This rule could not be asked (OSError: no such file)" in caplog.text


def test_silenced_by_id(tmp_path):
    assert found(tmp_path, Model(), gradient_clip_val=None, check={"silence": ["no-clipping"]}) == set()


def test_findings_are_events(tmp_path):
    found(tmp_path, Model(), gradient_clip_val=None)
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["id"], event["severity"]) == ("recipe", "no-clipping", "warning")


def test_asking_changes_nothing(tmp_path):
    class Augmented(Tokens):
        def __getitem__(self, i):
            torch.rand(3)
            return super().__getitem__(i)

    def weights(callbacks):
        torch.manual_seed(0)
        module = Model(dropout=0.1)
        trainer = make_trainer(max_steps=5, callbacks=callbacks, default_root_dir=tmp_path)
        trainer.fit(module, DataLoader(Augmented(), 4, shuffle=True), DataLoader(Augmented(20, 1), 4))
        return list(module.state_dict().values())

    with_it, without = weights([RecipeCheck()]), weights([])
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


# ---- modules that nobody here wrote


class Text(torch.utils.data.Dataset):
    vocab_size = 32

    def __len__(self):
        return 40

    def __getitem__(self, i):
        tokens = torch.randint(32, (9,), generator=torch.Generator().manual_seed(i))
        return tokens[:-1], tokens[1:]


def test_lightnings_own_transformer(tmp_path, monkeypatch):
    monkeypatch.setattr(LightningTransformer, "prepare_data", lambda self: None)  # it downloads
    ids = found(tmp_path, LightningTransformer(vocab_size=32), DataLoader(Text(), 4, shuffle=True), max_steps=10)
    assert ids == {"post-ln-without-warmup"}  # nn.Transformer is post-LN, and its learning rate is SGD's, constant


@pytest.mark.parametrize("cls", [BoringModel, ManualOptimBoringModel])
def test_lightnings_boring_models(tmp_path, cls):
    clip = {} if cls is BoringModel else {"gradient_clip_val": None}
    data = DataLoader(TensorDataset(torch.randn(64, 32)), 2, shuffle=True)
    module = cls()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch[0], batch_idx)
    assert found(tmp_path, module, data, **clip) == set()


# ---- while it learns


class NeverLearns(Model):
    """Says the same of every token."""

    def training_step(self, batch, batch_idx):
        logits = self.head.bias.expand(*batch["input_ids"].shape, 16)
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


class Copies(Model):
    """A task that can be learned: the label is the token itself."""

    def training_step(self, batch, batch_idx):
        return super().training_step({**batch, "labels": batch["input_ids"]}, batch_idx)

    def configure_optimizers(self):
        return with_warmup(torch.optim.AdamW(self.groups(), lr=1e-2))


@pytest.mark.parametrize("check", [{"not_learning_after": 2}, {"silence": ["not-learning"]}])
def test_a_gap_that_opens_late_is_found(tmp_path, check):
    class Memorises(Copies):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(2.5))  # what the first training losses are, too

    torch.manual_seed(0)
    loaders = DataLoader(Tokens(), 4, shuffle=True), DataLoader(Tokens(8, 1), 4)
    options = {"max_steps": 120, "max_epochs": -1, "val_check_interval": 20, "check": check}
    assert "generalization-gap" in found(tmp_path, Memorises(), *loaders, steps=120, **options)


@pytest.mark.parametrize(("cls", "expected"), [(NeverLearns, {"not-learning"}), (Copies, set())])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_learns_nothing_but_frequencies_is_found(tmp_path, cls, expected, accumulate):
    torch.manual_seed(0)
    options = {"max_steps": 80, "accumulate_grad_batches": accumulate, "check": {"not_learning_after": 80}}
    assert found(tmp_path, cls(), steps=80, max_epochs=-1, **options) - {"warmup-length"} == expected


def test_the_gap_between_training_and_validation(tmp_path):
    class Memorised(Copies):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", torch.tensor(5.0))

    loaders = DataLoader(Tokens(), 4, shuffle=True), DataLoader(Tokens(8, 1), 4)
    assert found(tmp_path, Memorised(), *loaders, steps=40) == {"generalization-gap"}


def test_a_schedule_that_is_over_before_the_run(tmp_path):
    def short(self):
        optimizer = torch.optim.AdamW(self.groups(), lr=1e-3)
        scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3) * max(0.0, 1 - step / 20))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    assert found(tmp_path, optimized(short)(), steps=19) == set()
    assert found(tmp_path, optimized(short)(), steps=30) == {"lr-zero"}


def test_a_schedule_that_ends_at_zero_with_the_run(tmp_path):
    def whole(self):
        optimizer = torch.optim.AdamW(self.groups(), lr=1e-3)
        scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3) * max(0.0, 1 - step / STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    assert found(tmp_path, optimized(whole)(), steps=STEPS) == set()


# ---- the curve


def schedulers(optimizer):
    yield CosineAnnealingLR(optimizer, 30)
    yield OneCycleLR(optimizer, 0.5, total_steps=30)
    yield SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1.0, 5), CosineAnnealingLR(optimizer, 25)], [5])


@pytest.mark.parametrize("which", range(3))
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_the_curve_is_what_the_scheduler_does_and_leaves_it_as_it_was(which):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = next(s for i, s in enumerate(schedulers(optimizer)) if i == which)
    expected_group, expected_state = dict(optimizer.param_groups[0]), repr(scheduler.state_dict())
    curve = learning_rates(optimizer, scheduler, range(30))[0]
    assert dict(optimizer.param_groups[0]) == expected_group
    assert repr(scheduler.state_dict()) == expected_state
    for step in range(30):
        assert curve[step] == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        scheduler.step()


def test_every_epoch_schedulers_and_plateaus_are_read(tmp_path):
    def by_epoch(self):
        optimizer = torch.optim.AdamW(self.groups(), lr=1e-3)
        return [optimizer], [LinearLR(optimizer, 0.1, 1.0, 2)]

    def plateau(self):
        optimizer = torch.optim.AdamW(self.groups(), lr=1e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val/loss"},
        }

    ids = found(tmp_path, optimized(by_epoch)(), max_steps=-1, max_epochs=40)
    assert ids == set()  # two epochs of 40 are 5 %
    assert found(tmp_path, optimized(plateau)(), val=DataLoader(Tokens(8, 1), 4)) == {"no-warmup"}


class FineTune(LightningModule):
    """As people write it: the model stays in the mode in which from_pretrained returns it."""

    def __init__(self, folder, train=False):
        super().__init__()
        self.model = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).train(train)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def configure_optimizers(self):
        decays = [p for n, p in self.named_parameters() if p.ndim > 1 and "embeddings" not in n]
        rest = [p for n, p in self.named_parameters() if not (p.ndim > 1 and "embeddings" not in n)]
        groups = [{"params": decays, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        return with_warmup(torch.optim.AdamW(groups, lr=1e-4))


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randint(5, 50, (8,)), 1


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # Lightning says so too
def test_a_pretrained_model_in_eval_mode_and_little_data(tmp_path):
    folder = save_bert(tmp_path / "bert")

    def data(n):
        return DataLoader(TensorDataset(torch.randint(5, 50, (n, 8)), torch.arange(n) % 2), 4, shuffle=True)

    assert found(tmp_path, FineTune(folder), train=data(40)) == {"eval-mode", "little-data"}
    assert found(tmp_path, FineTune(folder, train=True), train=data(1000)) == set()
    staged = GradualUnfreezing()
    assert found(tmp_path, FineTune(folder, train=True), train=data(40), beside=[staged]) == set()
    assert found(tmp_path, FineTune(folder, train=True), train=DataLoader(Endless(), 4)) == set()
    frozen = FineTune(folder, train=True)
    frozen.model.bert.requires_grad_(False).eval()
    assert found(tmp_path, frozen, train=data(40)) == set()


def test_ids_are_stable():
    assert len(IDS) == len(set(IDS)) == 25


# ---- what one process without a GPU does not come to


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parameters_in_fp16(dtype):
    module = Model().to(dtype)
    trainer = SimpleNamespace(optimizers=[torch.optim.AdamW(module.parameters())], scaler=None)
    plan = Plan(trainer, module)
    expected = 1 if dtype == torch.float16 else 0
    assert len(list(optimization_rules.fp16_without_scaler(plan))) == expected
    assert len(list(optimization_rules.adam_precision(plan))) == expected
    trainer.scaler = object()
    assert not list(optimization_rules.fp16_without_scaler(plan))


def test_the_batch_of_several_devices():
    sampler = {"num_replicas": 4, "rank": 0}
    trainer = SimpleNamespace(
        world_size=4, global_rank=0, accumulate_grad_batches=2, distributed_sampler_kwargs=sampler
    )
    ((text, _),) = optimization_rules.effective_batch(Plan(trainer, Model()))
    assert text == "A step sees 4 x 2 batches of the loader's size."
    trainer.world_size = sampler["num_replicas"] = 1
    assert not list(optimization_rules.effective_batch(Plan(trainer, Model())))
