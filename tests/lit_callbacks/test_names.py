import pytest

from lit_callbacks._names import clean_name, metric_key


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attention.weight",
        "_orig_mod.blocks.0.attention.weight",
        "module.blocks.0.attention.weight",
        "module._orig_mod.blocks.0.attention.weight",
        "_orig_mod.module.blocks.0.attention.weight",
        "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.attention.weight",
    ],
)
def test_wrappers_leave_no_trace(name):
    assert clean_name(name) == "blocks.0.attention.weight"


def test_module_is_an_ordinary_name_elsewhere():
    assert clean_name("encoder.module.weight") == "encoder.module.weight"
    assert clean_name("module") == "module"


def test_keys_hold_letters_digits_and_underscores_only():
    assert metric_key("model._orig_mod.blocks.0.q-proj") == "model_blocks_0_q_proj"
