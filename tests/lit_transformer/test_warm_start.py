"""Starting from another run's weights: the body is taken, another head is new, another architecture refused."""

from dataclasses import replace

import pytest
import torch

from lit_transformer import LitCausalLM
from lit_transformer.errors import UsageError
from tiny_task import TINY, Blocks, trainer

UNTIED = replace(TINY, tie_embeddings=False)


def save(tmp_path, config):
    torch.manual_seed(5)
    fit = trainer(tmp_path, max_steps=1)
    module = LitCausalLM(config)
    fit.fit(module, Blocks())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    return module, str(tmp_path / "a.ckpt")


def started(tmp_path, config, checkpoint, **settings):
    """The weights that training begins with."""
    module = LitCausalLM(config, init_from=checkpoint)
    trainer(tmp_path, max_steps=0, **settings).fit(module, Blocks())
    return module


def test_everything_that_fits_is_taken(tmp_path):
    source, checkpoint = save(tmp_path, TINY)
    module = started(tmp_path, TINY, checkpoint)
    assert all(torch.equal(p, source.state_dict()[name]) for name, p in module.state_dict().items())


def test_another_head_is_new(tmp_path):
    source, checkpoint = save(tmp_path, replace(TINY, norm_placement="post"))
    contents = torch.load(checkpoint, weights_only=True)
    contents["state_dict"]["model.head.weight"] = torch.zeros(3, 16)  # of three classes
    torch.save(contents, checkpoint)
    module = started(tmp_path, replace(UNTIED, norm_placement="post"), checkpoint)
    different = [name for name, p in module.named_parameters() if not torch.equal(p, source.state_dict()[name])]
    assert different == ["model.head.weight"]


def test_a_resumed_run_has_its_own_weights(tmp_path):
    _, checkpoint = save(tmp_path, TINY)
    module = LitCausalLM(TINY, init_from=str(tmp_path / "no such file"))
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(module, Blocks(), ckpt_path=checkpoint, weights_only=True)
    assert fit.global_step > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3}, r"model\.blocks\.2\.\S+ is \(\S+\) here and not there"),
        ({"n_layers": 1}, r"it has model\.blocks\.1\.\S+, which is not here"),
        ({"d_model": 32}, r"is \(\d+, 32\) here and \(\d+, 16\) there"),
        ({"vocab_size": 12}, r"token_embedding\.weight is \(12, 16\) here and \(11, 16\) there"),
    ],
)
def test_another_architecture_is_refused(tmp_path, changes, message):
    _, checkpoint = save(tmp_path, TINY)
    with pytest.raises(UsageError, match=f"another architecture: .*{message}"):
        started(tmp_path, replace(TINY, **changes), checkpoint)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="there is no checkpoint"):
        started(tmp_path, TINY, str(tmp_path / "none.ckpt"))
    torch.save({"a": 1}, tmp_path / "b.ckpt")
    with pytest.raises(UsageError, match="not a checkpoint of this package"):
        started(tmp_path, TINY, str(tmp_path / "b.ckpt"))


def test_only_the_mask_of_a_masked_language_model_is_left_out(tmp_path):
    _, checkpoint = save(tmp_path, replace(TINY, vocab_size=12))
    with pytest.raises(UsageError, match=r"token_embedding\.weight is \(11, 16\) here and \(12, 16\) there"):
        started(tmp_path, TINY, checkpoint)
