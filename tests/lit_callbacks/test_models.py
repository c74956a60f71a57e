"""On models that nobody here wrote, unmodified: every layer is seen, and training ends with the same bits."""

import logging

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos import LightningTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import MemoryLogger, assert_identical, snapshot
from lit_callbacks import (
    ActivationStatsMonitor,
    AttentionEntropyMonitor,
    DeadNeuronDetector,
    DivergenceError,
    GradientNormLogger,
    LossSpikeRecovery,
    ParameterStatsLogger,
    ThroughputLogger,
)
from lit_callbacks.rules import RobustRule
from lit_callbacks.testing import Fault, FaultInjector

VOCABULARY, LENGTH, WIDTH, HEADS = 64, 12, 32, 4
IDS = torch.randint(1, VOCABULARY, (16, LENGTH), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Wrapper(LightningModule):
    """Somebody's model, and how to get a loss out of it."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.model, batch)

    def validation_step(self, batch, batch_idx):
        self.loss(self.model, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def language_model_loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def logits_loss(model, ids):
    return model(ids).square().mean()


def hugging_face(name, **options):
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = getattr(transformers, f"{name}Config")
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers, config(**({} if name == "ViT" else tokens), **options)


def gpt2(implementation="sdpa"):
    # Dropout on: random numbers must be the same with callbacks and without.
    transformers, config = hugging_face(
        "GPT2", n_layer=2, n_head=HEADS, n_embd=WIDTH, n_positions=16, attn_implementation=implementation
    )
    return transformers.GPT2LMHeadModel(config), language_model_loss


def llama(implementation="sdpa"):
    transformers, config = hugging_face(
        "Llama", num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=2, hidden_size=WIDTH,
        intermediate_size=48, attn_implementation=implementation,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), language_model_loss


def bert():
    transformers, config = hugging_face(
        "Bert", num_hidden_layers=2, num_attention_heads=HEADS, hidden_size=WIDTH, intermediate_size=48
    )

    def loss(model, ids):
        padded = torch.ones_like(ids)
        padded[:, 9:] = 0
        return model(input_ids=ids, attention_mask=padded, labels=ids).loss

    return transformers.BertForMaskedLM(config), loss


def t5():
    transformers, config = hugging_face(
        "T5", num_layers=2, num_heads=HEADS, d_model=WIDTH, d_ff=48, d_kv=8, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), language_model_loss


def vit():
    transformers, config = hugging_face(
        "ViT", num_hidden_layers=2, num_attention_heads=HEADS, hidden_size=WIDTH, intermediate_size=48, image_size=16,
        patch_size=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), lambda model, x: model(pixel_values=x).logits.square().mean()


class TorchEncoder(nn.Module):
    """torch.nn.TransformerEncoder over embeddings, causal."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True)
        self.embedding, self.encoder = nn.Embedding(VOCABULARY, WIDTH), nn.TransformerEncoder(layer, 2)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.size(1))
        return self.encoder(self.embedding(ids), mask=mask, is_causal=True)


def torch_encoder():
    return TorchEncoder(), logits_loss


def x_transformers(flash):
    x = pytest.importorskip("x_transformers")
    layers = x.Decoder(dim=WIDTH, depth=2, heads=HEADS, attn_flash=flash, ff_swish=True, ff_glu=True)
    return x.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=layers), logits_loss


def litgpt():
    pytest.importorskip("litgpt")
    from litgpt import GPT, Config

    options = {"vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY, "block_size": LENGTH}
    return GPT(Config(n_layer=2, n_head=HEADS, n_embd=WIDTH, **options)), logits_loss


def lora():
    peft = pytest.importorskip("peft")
    model, loss = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj", "gate_proj"])
    return peft.get_peft_model(model, config), loss


MODELS = {
    "GPT-2": (gpt2, ["transformer.h.{}.attn"], ["transformer.h.{}.mlp.c_proj"]),
    "GPT-2 eager": (lambda: gpt2("eager"), ["transformer.h.{}.attn"], ["transformer.h.{}.mlp.c_proj"]),
    "LLaMA": (llama, ["model.layers.{}.self_attn"], ["model.layers.{}.mlp.down_proj"]),
    "LLaMA eager": (lambda: llama("eager"), ["model.layers.{}.self_attn"], ["model.layers.{}.mlp.down_proj"]),
    "BERT": (bert, ["bert.encoder.layer.{}.attention.self"], ["bert.encoder.layer.{}.output.dense"]),
    "T5": (
        t5,
        [
            "encoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.1.EncDecAttention",
        ],
        ["encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo"],
    ),
    "ViT": (vit, ["vit.layers.{}.attention"], ["vit.layers.{}.mlp.fc2"]),
    "nn.TransformerEncoder": (torch_encoder, ["encoder.layers.{}.self_attn"], ["encoder.layers.{}.linear2"]),
    "x-transformers": (
        lambda: x_transformers(flash=False),
        ["attn_layers.layers.{0}.1.attend"],
        ["attn_layers.layers.{1}.1.ff.2"],
    ),
    "x-transformers flash": (
        lambda: x_transformers(flash=True),
        ["attn_layers.layers.{0}.1.attend"],
        ["attn_layers.layers.{1}.1.ff.2"],
    ),
    "litgpt": (litgpt, ["transformer.h.{}.attn"], ["transformer.h.{}.mlp.proj"]),
    "LLaMA with LoRA": (lora, ["model.layers.{}.self_attn"], ["model.layers.{}.mlp.down_proj"]),
}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft calls transformers
each_model = pytest.mark.parametrize("name", MODELS)


def expected_layers(name, templates):
    # x-transformers numbers attention and feed-forward in turns.
    numbers = [(0, 1), (2, 3)] if name.startswith("x-") else [(0, 0), (1, 1)]
    layers = (template.format(*number) for template in templates for number in numbers)
    return {f"model_{layer}".replace(".", "_") for layer in layers}


def watchers(blocks):
    return [
        GradientNormLogger(1),
        AttentionEntropyMonitor(1),
        DeadNeuronDetector(1, window_tokens=1),
        ActivationStatsMonitor(1, modules=blocks),
        ParameterStatsLogger(1),
        ThroughputLogger(2),
    ]


def fit(make_trainer, name, callbacks, **options):
    torch.manual_seed(0)
    module = Wrapper(*MODELS[name][0]())
    logger = MemoryLogger()
    trainer = make_trainer(callbacks=callbacks, logger=logger, **{"max_steps": 3, **options})
    trainer.fit(module, DataLoader(PIXELS if name == "ViT" else IDS, batch_size=4))
    return module, trainer, logger


def keys(logger, section):
    return {key.partition("/")[2] for _, values in logger.calls for key in values if key.startswith(f"{section}/")}


@each_model
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_layer_is_seen_and_the_weights_end_bit_identical(make_trainer, name, precision):
    _, attention, units = MODELS[name]
    # x-transformers' blocks are lists; the last of each adds to the residual stream.
    callbacks = watchers("*.layers.?.2" if name.startswith("x-") else None)
    module, trainer, logger = fit(make_trainer, name, callbacks, precision=precision)
    assert not any(callback.off for callback in callbacks)
    assert keys(logger, "attention_entropy") == expected_layers(name, attention) | {"min"}
    found = {key for key in keys(logger, "dead_neurons") if "transform_act" not in key}  # BERT's head
    assert found == expected_layers(name, units) | {"window_tokens"}
    assert len(keys(logger, "residual")) == 3 * (4 if name in ("T5", "x-transformers", "x-transformers flash") else 2)
    assert {"total", "clipped"} < keys(logger, "grad_norm")
    assert keys(logger, "throughput")

    plain, plain_trainer, _ = fit(make_trainer, name, [], precision=precision)
    assert_identical(snapshot(module, trainer), snapshot(plain, plain_trainer))


def test_adapters_change_no_names_and_no_entropies(make_trainer):
    pytest.importorskip("peft")
    _, _, adapted = fit(make_trainer, "LLaMA with LoRA", [AttentionEntropyMonitor(1)], max_steps=1)
    _, _, plain = fit(make_trainer, "LLaMA", [AttentionEntropyMonitor(1)], max_steps=1)
    assert adapted.calls[0][1] == pytest.approx(plain.calls[0][1], rel=1e-5)


def test_fused_and_eager_attention_measure_the_same(make_trainer):
    for name in ("GPT-2", "LLaMA"):
        values = []
        for variant in (name, f"{name} eager"):
            torch.manual_seed(0)
            module = Wrapper(*MODELS[variant][0]())
            (validated,) = make_trainer(callbacks=[AttentionEntropyMonitor()]).validate(
                module, DataLoader(IDS, batch_size=4), verbose=False
            )
            values.append(validated)
        assert values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-4)


def test_a_padded_batch_measures_what_a_short_one_does(make_trainer):
    """BERT sees nine of twelve tokens: padded keys and queries do not count."""
    model, padded_loss = bert()
    model.eval()

    def short_loss(model, ids):
        return model(input_ids=ids[:, :9], labels=ids[:, :9].contiguous()).loss

    values = []
    for loss in (padded_loss, short_loss):
        trainer = make_trainer(callbacks=[AttentionEntropyMonitor()])
        (validated,) = trainer.validate(Wrapper(model, loss), DataLoader(IDS, batch_size=4), verbose=False)
        values.append(validated)
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_is_seen_and_not_compiled_again(make_trainer):
    def run(callbacks):
        frames = []

        def backend(graph, inputs):
            frames.append(graph)
            return graph.forward

        torch.manual_seed(0)
        torch.compiler.reset()
        model, loss = llama()
        module = Wrapper(torch.compile(model, backend=backend, dynamic=False), loss)
        logger = MemoryLogger()
        make_trainer(callbacks=callbacks, logger=logger, max_steps=4).fit(module, DataLoader(IDS, batch_size=4))
        weights = torch.cat([p.detach().flatten() for p in module.parameters()])
        return len(frames), weights, logger

    frames, weights, logger = run([AttentionEntropyMonitor(2), DeadNeuronDetector(2, window_tokens=1)])
    assert keys(logger, "attention_entropy") == expected_layers("LLaMA", MODELS["LLaMA"][1]) | {"min"}
    plain_frames, plain_weights, _ = run([])
    assert frames == plain_frames > 0
    torch.testing.assert_close(weights, plain_weights, rtol=1e-4, atol=1e-6)


def test_flops_agree_with_the_formula(make_trainer):
    """Chowdhery et al. 2022: 6 N for each token, and 12 L H Q T for attention; the embedding is looked up."""
    throughput = ThroughputLogger(1)
    module, _, _ = fit(make_trainer, "litgpt", [throughput], max_steps=1)
    matrices = sum(p.numel() for name, p in module.named_parameters() if p.dim() == 2 and "wte" not in name)
    tokens = 4 * LENGTH
    assert 3 * throughput._forward.total == tokens * (6 * matrices + 12 * 2 * WIDTH * LENGTH)


N_STEPS = 40


def batches(without=()):
    """Forty batches of sequences that can be learnt, so that the loss is calm."""
    ids = IDS.repeat(10, 1)[: 4 * N_STEPS]
    kept = [i for i in range(N_STEPS) if i not in without]
    return [list(range(4 * i, 4 * i + 4)) for i in kept], ids


class Demo(LightningTransformer):
    """Without its download of a text."""

    def prepare_data(self):
        pass


def demo():
    torch.manual_seed(0)
    return Demo(vocab_size=64)


def somebodys(name):
    torch.manual_seed(0)
    return Wrapper(*MODELS[name][0]())


SUBJECTS = {
    "Lightning's demo": demo,
    "GPT-2": lambda: somebodys("GPT-2"),
    "LLaMA with LoRA": lambda: somebodys("LLaMA with LoRA"),
    "nn.TransformerEncoder": lambda: somebodys("nn.TransformerEncoder"),
}


def recover(make_trainer, name, faults, without=()):
    sampler, ids = batches(without)
    data = TensorDataset(ids[:, :-1], ids[:, 1:]) if name == "Lightning's demo" else ids
    recovery = LossSpikeRecovery(RobustRule(window=20, least=10), snapshot_every_n_steps=10, prove_steps=5)
    injector = FaultInjector(faults)
    trainer = make_trainer(max_epochs=1, callbacks=[recovery, injector])
    module = SUBJECTS[name]()
    trainer.fit(module, DataLoader(data, batch_sampler=sampler))
    injector.assert_all_fired()
    return snapshot(module, trainer), recovery.state_dict()["report"]["history"]


@pytest.mark.parametrize("name", SUBJECTS)
def test_skips_and_rollbacks_are_exact(make_trainer, name):
    where = "*lora_A*" if "LoRA" in name else None  # the rest is frozen
    faults = [Fault("nan_loss", step=12), Fault("nan_weight", step=27, where=where)]
    bad, history = recover(make_trainer, name, faults)
    skip, *_, rollback = history
    assert skip == [12, "skip"]
    assert rollback[1] == "rollback"
    good, nothing = recover(make_trainer, name, [], without=[12, *range(21, rollback[0] + 1)])
    assert nothing == []
    assert_identical(bad, good)


def test_damage_to_frozen_weights_cannot_be_undone_and_ends_the_run(make_trainer):
    with pytest.raises(DivergenceError, match="Stopped at step 28"):
        recover(make_trainer, "LLaMA with LoRA", [Fault("nan_weight", step=27, where="*q_proj.weight")])
