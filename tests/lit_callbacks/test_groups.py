import re

import pytest
import torch
from torch import nn

from helpers import TinyLM
from lit_callbacks._groups import ParameterGroups


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.mlp = nn.LayerNorm(4), Mlp()
        self.self_attn = nn.MultiheadAttention(4, 2)


class Model(nn.Module):
    """A head that is tied to the embedding, and a stack of layers."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(4, 10, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def sizes(groups):
    numbers = torch.tensor([p.numel() for p in Model().parameters()])
    return dict(zip(groups.names, groups.sums(numbers).tolist(), strict=True))


def test_layers_and_kinds_divide_the_parameters():
    groups = ParameterGroups(Model(), ["layers", "kinds"])
    attention_in, attention_out = 12 * 4 + 12, 4 * 4 + 4
    layer = attention_in + attention_out + 8 + (4 * 8 + 8) + (8 * 4 + 4)
    assert sizes(groups) == {
        "layer_0": layer,
        "layer_1": layer,
        "attention_in": 2 * attention_in,
        "attention_out": 2 * attention_out,
        "feed_forward_in": 2 * 40,
        "feed_forward_out": 2 * 36,
        "norm": 16,
        "embedding": 40,  # tied: once
    }


def test_parameters_and_globs():
    groups = ParameterGroups(Model(), ["parameters"])
    assert len(groups.names) == len(groups.parameters) == 1 + 2 * 10
    assert "layers_0_self_attn_in_proj_weight" in groups.names
    groups = ParameterGroups(Model(), ["*.mlp.*", "layers.1.*", "*.bias"])
    assert groups.names == ["__mlp__", "layers_1__", "__bias"]
    assert sizes(groups)["__mlp__"] == 2 * 76


@pytest.mark.parametrize("by", [["*.nothing"], ["layers", "encoder.*"]])
def test_a_glob_that_matches_nothing_is_refused(by):
    with pytest.raises(ValueError, match=f"groups must be 'layers', .* got {re.escape(repr(by[-1]))}"):
        ParameterGroups(Model(), by)


def test_two_groups_of_a_name_are_refused():
    with pytest.raises(ValueError, match="different names, got two called '__weight'"):
        ParameterGroups(Model(), ["*.weight", "*?weight"])


def test_sums_go_to_every_group_of_a_parameter():
    model = Model()
    groups = ParameterGroups(model, ["layers", "*.bias"])
    given = [p for name, p in model.named_parameters() if name.startswith("layers.1.mlp")]
    placed = groups.place([*given, torch.zeros(3)], torch.tensor([1.0, 2.0, 4.0, 8.0, 100.0]))
    assert groups.sums(placed).tolist() == [0.0, 15.0, 10.0]


def test_names_do_not_depend_on_wrappers():
    model = Model()
    plain = ParameterGroups(model, ["layers", "kinds", "parameters"])
    wrapped = ParameterGroups(nn.ModuleDict({"_orig_mod": model}), ["layers", "kinds", "parameters"])
    assert wrapped.names == plain.names
    assert wrapped.parameters == plain.parameters


def test_two_stacks_are_told_apart():
    model = nn.ModuleDict({"encoder": Model().layers, "decoder": Model().layers})
    assert ParameterGroups(model, ["layers"]).names == ["encoder_0", "encoder_1", "decoder_0", "decoder_1"]


def test_a_module_without_layers_has_kinds():
    assert ParameterGroups(nn.Linear(2, 2), ["layers", "kinds"]).names == ["head"]
    assert ParameterGroups(TinyLM(), ["layers"]).names == ["layer_0", "layer_1"]
