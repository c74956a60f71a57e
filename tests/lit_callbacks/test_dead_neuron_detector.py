"""Networks in which it is known which units are silent."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from helpers import MemoryLogger, TinyLM, loader
from lit_callbacks import DeadNeuronDetector
from lit_callbacks.functional import silent_units

UNITS = 16


def silence(up, dead=(), quiet=()):
    """Give `up` ordinary units, some that no input can wake, and some a thousand times quieter than the others."""
    with torch.no_grad():
        up.weight.normal_()
        up.bias.zero_()
        for unit in dead:
            up.weight[unit] = 0
            up.bias[unit] = -30.0
        for unit in quiet:
            up.weight[unit] *= 1e-3
    return up


class Relu(nn.Module):
    """up, F.relu, dropout, down."""

    def __init__(self):
        super().__init__()
        self.up, self.down = silence(nn.Linear(16, UNITS), dead=(1, 2), quiet=(5,)), nn.Linear(UNITS, 16)

    def forward(self, x):
        return self.down(F.dropout(F.relu(self.up(x)), 0.5))


class InSequence(nn.Sequential):
    """The same of modules, with the activation squared by one in between."""

    def __init__(self):
        class Square(nn.Module):
            def forward(self, x):
                return x**2

        up = silence(nn.Linear(16, UNITS), dead=(1, 2), quiet=(5,))
        super().__init__(up, nn.ReLU(inplace=True), Square(), nn.Dropout(0.5), nn.Linear(UNITS, 16))


class Gelu(nn.Module):
    """A GELU, reshaped on the way."""

    def __init__(self):
        super().__init__()
        self.up, self.down = silence(nn.Linear(16, UNITS), dead=(1, 2), quiet=(5,)), nn.Linear(UNITS, 16)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)).view(-1, UNITS)).view(x.shape)


class SwiGlu(nn.Module):
    """The product counts: unit 1 is dead because its gate is, unit 2 because its other factor is."""

    def __init__(self):
        super().__init__()
        self.gate = silence(nn.Linear(16, UNITS))
        self.up = silence(nn.Linear(16, UNITS), quiet=(5,))
        self.down = nn.Linear(UNITS, 16)
        with torch.no_grad():
            self.gate.weight[1], self.gate.bias[1] = 0, -200.0
            self.up.weight[2], self.up.bias[2] = 0, 0.0

    def forward(self, x):
        return self.down(self.up(x) * F.silu(self.gate(x)))


class FusedSwiGlu(nn.Module):
    """Gate and up in one matrix."""

    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(16, 2 * UNITS), nn.Linear(UNITS, 16)
        with torch.no_grad():
            self.gate_up.weight.normal_()
            self.gate_up.weight[UNITS + 1 : UNITS + 3] = 0
            self.gate_up.bias[UNITS + 1 : UNITS + 3] = 0
            self.gate_up.weight[UNITS + 5] *= 1e-3
            self.gate_up.bias[UNITS + 5] = 0

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Model(TinyLM):
    """TinyLM with a feed-forward network of some kind in its stream; nothing is learnt."""

    def __init__(self, network):
        super().__init__(lr=0.0, weight_decay=0.0)
        self.blocks.append(network)


def fit(make_trainer, module, data=None, detector=None, **options):
    detector = DeadNeuronDetector(**{"every_n_steps": 1, "window_tokens": 1, **(detector or {})})
    logger = MemoryLogger()
    trainer = make_trainer(callbacks=[detector], logger=logger, **{"max_steps": 2, **options})
    trainer.fit(module, data or loader())
    return detector, logger, trainer


@pytest.mark.parametrize(
    ("network", "layer", "weight_dead"),
    [
        (Relu, "blocks_2_down", 2 / 16),
        (InSequence, "blocks_2_4", 2 / 16),
        (Gelu, "blocks_2_down", 2 / 16),
        (SwiGlu, "blocks_2_down", 2 / 32),
        (FusedSwiGlu, "blocks_2_down", 2 / 32),
    ],
)
def test_known_dead_dormant_and_weightless_units(make_trainer, network, layer, weight_dead):
    _, logger, _ = fit(make_trainer, Model(network()))
    for _, values in logger.calls:
        assert values[f"dead_neurons/{layer}"] == 2 / 16
        assert values[f"dormant_neurons/{layer}"] == 3 / 16
        assert values[f"weight_dead_neurons/{layer}"] == pytest.approx(weight_dead)
        assert values["dead_neurons/head"] == 0  # TinyLM's own GELU
    assert "dormant_persistence/head" not in logger.calls[1][1]
    assert logger.calls[1][1][f"dormant_persistence/{layer}"] == 1
    assert f"dormant_persistence/{layer}" not in logger.calls[0][1]


def test_hand_numbers():
    dead, dormant = silent_units(torch.tensor([0.0, 1e-30, 0.3, 8.0, 3.7]), tau=0.1)  # mean 2.4
    assert dead.tolist() == [True, False, False, False, False]
    assert dormant.tolist() == [True, True, False, False, False]


def test_a_window_is_as_many_tokens_as_asked_for(make_trainer):
    # 32 tokens a step, all of them seen; a window of 80 is full after three steps
    detector, logger, _ = fit(make_trainer, TinyLM(), detector={"window_tokens": 80}, max_steps=8)
    assert logger.values("dead_neurons/window_tokens") == {2: 96.0, 5: 96.0}
    assert detector.state_dict()["window"]["tokens head"] == [64]


def test_a_unit_is_dead_over_the_whole_window_only(make_trainer):
    class Wakes(TinyLM):
        """Unit 3 of the last layer is silent, except in the third step."""

        def __init__(self):
            super().__init__(lr=0.0, weight_decay=0.0)
            self.network = Relu()
            self.blocks.append(self.network)
            silence(self.network.up, dead=(3,))

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.network.up.bias[3] = 1.0 if self.global_step == 2 else -30.0
            return super().training_step(batch, batch_idx)

    _, logger, _ = fit(make_trainer, Wakes(), detector={"window_tokens": 96}, max_steps=9)
    assert list(logger.values("dead_neurons/blocks_2_down").values()) == [0, 1 / 16, 1 / 16]
    assert list(logger.values("dormant_persistence/blocks_2_down").values()) == [1.0]


def test_long_batches_are_sampled_in_training_and_read_whole_in_validation(make_trainer):
    data = loader(batch_size=300, n_samples=600)  # 2400 tokens a batch
    _, logger, _ = fit(make_trainer, TinyLM(), data, max_steps=1)
    assert logger.values("dead_neurons/window_tokens") == {0: 240.0}
    (validated,) = make_trainer(callbacks=[DeadNeuronDetector()]).validate(TinyLM(), data, verbose=False)
    assert validated["dead_neurons/window_tokens"] == 4800


def test_validation_knows_the_dead_units_of_the_whole_loader(make_trainer):
    (validated,) = make_trainer(callbacks=[DeadNeuronDetector()]).validate(Model(Relu()), loader(), verbose=False)
    assert validated["dead_neurons/blocks_2_down"] == 2 / 16


def test_indices_are_written_on_request(make_trainer):
    _, _, trainer = fit(make_trainer, Model(Relu()), detector={"write_indices": True}, max_steps=1)
    lines = [json.loads(line) for line in Path(trainer.default_root_dir, "dead_neurons.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 0, "layer": "blocks.2.down", "tokens": 32, "units": 16, "dead": [1, 2], "dormant": [1, 2, 5]}
    ]
    _, _, trainer = fit(make_trainer, Model(Relu()), max_steps=1, default_root_dir=trainer.default_root_dir + "/b")
    assert not Path(trainer.default_root_dir, "dead_neurons.jsonl").exists()


class SaveEveryEpoch(Callback):
    """Leaves a checkpoint in the middle of a window."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/epoch={trainer.current_epoch}.ckpt")


def test_a_resumed_run_reports_what_the_uninterrupted_one_does(make_trainer, tmp_path):
    def run(**options):
        torch.manual_seed(0)
        logger = MemoryLogger()
        trainer = make_trainer(
            callbacks=[DeadNeuronDetector(1, window_tokens=150), SaveEveryEpoch()], logger=logger, max_epochs=3
        )
        trainer.fit(Model(Gelu()), loader(n_samples=16), **options)
        return logger

    whole = run()
    assert whole.values("dead_neurons/window_tokens") == {4: 160.0, 9: 160.0}
    resumed = run(ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert resumed.calls == whole.calls
    resumed = run(ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert resumed.calls == whole.calls[1:]
    assert "dormant_persistence/blocks_2_down" in resumed.calls[0][1]


class Convolution(TinyLM):
    """Activations between convolutions, whose last dimension is a place, not a unit."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ReLU(), nn.Conv1d(2, 1, 3))

    def loss(self, batch):
        return self.net(batch["tokens"].float().unsqueeze(1)).mean()


def test_a_model_without_hidden_units_gets_one_line(make_trainer):
    with pytest.warns(UserWarning, match="saw no hidden units in this model") as seen:
        _, logger, _ = fit(make_trainer, Convolution(), max_steps=4)
    assert sum("saw no hidden units" in str(w.message) for w in seen) == 1
    assert logger.calls == []


def test_units_before_a_norm_are_named_after_their_activation(make_trainer):
    network = nn.Sequential(silence(nn.Linear(16, UNITS), dead=(0,)), nn.ReLU(), nn.LayerNorm(UNITS))
    _, logger, _ = fit(make_trainer, Model(network), max_steps=1)
    assert logger.calls[0][1]["dead_neurons/blocks_2_1"] == 1 / 16
