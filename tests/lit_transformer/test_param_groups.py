"""Groups by name, on our models and on those of Hugging Face."""

import io
import re

import pytest
import torch
import transformers as hf
from torch import nn

from lit_transformer.errors import UsageError
from lit_transformer.nn import Transformer, TransformerConfig
from lit_transformer.optim import MuonAdamW, Override, ParamGroups, layer_depths


def ours():
    return Transformer(TransformerConfig(vocab_size=11, d_model=16, n_layers=2, n_heads=2))


def bert():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=50, max_position_embeddings=16, **small))


def gpt2():
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, **tokens))


def t5():
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=50, **small))


def by_group(model, param_groups=None, **options):
    """Names of parameters by name of the group."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = (param_groups or ParamGroups()).build(model, **options)
    assert sum(len(group["params"]) for group in groups) == len({id(p) for group in groups for p in group["params"]})
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


MODELS = [
    (ours, r"blocks\.\d\.(attention\.sublayer\.(qkv|out)|feed_forward\.sublayer\.(up|down))\.weight"),
    (
        bert,
        r"bert\.encoder\.layer\.\d\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
        r"\.weight|bert\.pooler\.dense\.weight|classifier\.weight",
    ),
    (gpt2, r"transformer\.h\.\d\.(attn\.c_(attn|proj)|mlp\.c_(fc|proj))\.weight"),
    (
        t5,
        r"(en|de)coder\.block\.\d\.layer\.\d\.((SelfAttention|EncDecAttention)\.[qkvo]|DenseReluDense\.w[io])\.weight",
    ),
]


@pytest.mark.parametrize(("make", "decaying"), MODELS)
def test_matrices_decay_and_nothing_else(make, decaying):
    model = make()
    groups = by_group(model)
    names = {name for name, _ in model.named_parameters()}
    assert groups["decay"] == {name for name in names if re.fullmatch(decaying, name)}
    assert groups["no_decay"] == names - groups["decay"]


@pytest.mark.parametrize("make", [make for make, _ in MODELS])
def test_layer_decay_by_name(make):
    model = make()
    depths = layer_depths(model)
    first = r"(blocks|bert\.encoder\.layer|transformer\.h|(en|de)coder\.block)\.0\."
    assert {depth for name, depth in depths.items() if re.match(first, name)} == {1}
    assert {depth for name, depth in depths.items() if re.match(r".*(wte|word_embed|shared|token_embed)", name)} <= {0}
    groups = ParamGroups(layer_decay=0.5).build(model)
    by_parameter = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        group = by_parameter[id(parameter)]
        assert group["lr_scale"] == 0.5 ** (3 - depths[name])
        assert group["name"] == f"layer_{depths[name]}_" + ("no_decay" if group.get("weight_decay") == 0 else "decay")


def test_overrides_by_glob_the_last_counts():
    model = ours()
    overrides = [Override("blocks.*", lr_scale=0.5), Override("blocks.1.*", lr_scale=0.1, weight_decay=0.3)]
    groups = {group["name"]: group for group in ParamGroups(overrides=overrides).build(model)}
    assert {name: (group["lr_scale"], group.get("weight_decay")) for name, group in groups.items()} == {
        "no_decay": (1.0, 0.0),
        "blocks_decay": (0.5, None),
        "blocks_no_decay": (0.5, 0.0),
        "blocks_1_decay": (0.1, 0.3),
        "blocks_1_no_decay": (0.1, 0.3),
    }


def test_what_is_frozen_is_in_no_group():
    model = ours()
    groups = ParamGroups(overrides=[Override("*", freeze=True), Override("blocks.1.*")])
    groups.freeze(model)
    trained = set().union(*by_group(model, groups).values())
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("blocks.1.")}
    with pytest.raises(UsageError, match="every parameter of the model is frozen"):
        ParamGroups().build(ours().requires_grad_(False))


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(UsageError, match=r"no parameter matches 'block\.0\.\*'; names are such as .*blocks\.0\."):
        ParamGroups(overrides=[Override("block.0.*")]).freeze(ours())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParamGroups(layer_decay=0.0), "layer_decay must be above 0 and at most 1, got 0.0"),
        (lambda: Override("*", lr_scale=-1.0), "lr_scale must be at least 0, got -1.0"),
        (lambda: Override("*", weight_decay=-0.1), "weight_decay must be at least 0, got -0.1"),
    ],
)
def test_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_groups_travel_as_plain_data():
    groups = ParamGroups(0.9, [Override("a*", 0.5)])
    assert ParamGroups(layer_decay=0.9, overrides=[{"pattern": "a*", "lr_scale": 0.5}]) == groups


# ---- Muon


@pytest.mark.parametrize("make", [make for make, _ in MODELS])
def test_muon_gets_the_matrices_inside_of_layers(make):
    groups = by_group(make(), hidden_apart=True)
    assert groups["hidden"]
    assert all(re.search(r"\.\d\.", name) and not name.endswith("bias") for name in groups["hidden"])
    assert not groups.get("decay", set()) - {"bert.pooler.dense.weight", "classifier.weight"}


def step_twice(model, make_optimizers):
    optimizers = make_optimizers(model)
    for step in range(2):
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + i))
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()], optimizers


def two_of_torch(model):
    groups = ParamGroups().build(model, hidden_apart=True)
    muon = [group for group in groups if group["muon"]]
    rest = [group for group in groups if not group["muon"]]
    return [
        torch.optim.Muon(muon, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
    ]


def one(model):
    return [MuonAdamW(ParamGroups().build(model, hidden_apart=True), lr=0.01)]


def test_it_is_torchs_two_optimizers():
    torch.manual_seed(0)
    a, b = ours(), ours()
    b.load_state_dict(a.state_dict())
    for expected, actual in zip(step_twice(a, two_of_torch)[0], step_twice(b, one)[0], strict=True):
        assert torch.equal(actual, expected)


def test_it_goes_on_from_a_saved_state():
    torch.manual_seed(0)
    a, b = ours(), ours()
    b.load_state_dict(a.state_dict())
    _, [optimizer] = step_twice(a, one)
    expected, _ = step_twice(a, lambda model: [optimizer])

    _, [first] = step_twice(b, one)
    saved = torch.load(_saved(first.state_dict()), weights_only=True)

    def resumed(model):
        [again] = one(model)
        again.load_state_dict(saved)
        return [again]

    actual, _ = step_twice(b, resumed)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_without_groups_matrices_get_muon():
    optimizer = MuonAdamW([{"params": nn.Linear(4, 3).parameters(), "lr": 0.5}])
    assert [(group["muon"], group["lr"]) for group in optimizer.param_groups] == [(True, 0.5), (False, 0.5)]
    with pytest.raises(ValueError, match="2D"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}])
