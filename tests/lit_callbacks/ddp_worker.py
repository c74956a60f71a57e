"""Run by test_ddp.py in two processes: several checks in one launch, each leaving its facts in a file per rank."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch

from helpers import MemoryLogger, TinyLM, TokensWithIds, make_trainer
from lit_callbacks import (
    ActivationStatsMonitor,
    AdaptiveGradientClipping,
    AttentionEntropyMonitor,
    Dashboard,
    DeadNeuronDetector,
    DivergenceError,
    GradientNormLogger,
    LossCurve,
    LossSpikeRecovery,
    NonFiniteAutopsy,
    NonFiniteGuard,
    ParameterStatsLogger,
    ThroughputLogger,
)
from lit_callbacks._observer import Observer
from lit_callbacks._ranks import Measurement
from lit_callbacks.rules import RobustRule
from lit_callbacks.testing import Fault, FaultInjector

RANK, WORLD = int(os.environ.get("RANK", 0)), 2


class Shards(TokensWithIds):
    """Every batch of `batch_size` samples, split between the ranks in order."""

    def train_dataloader(self):
        whole = super().train_dataloader()
        half = self.options["batch_size"] // WORLD
        batches = [batch[RANK * half : (RANK + 1) * half] for batch in whole.batch_sampler]
        return torch.utils.data.DataLoader(whole.dataset, batch_sampler=batches)


class FailsOnRankOne(Observer):
    """Raises on one rank only."""

    def __init__(self):
        super().__init__(every_n_steps=1)
        self.measured = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.report(trainer, pl_module, trainer.global_step, self.measure)

    def measure(self):
        self.measured += 1
        if RANK == 1 and self.measured == 2:
            raise ZeroDivisionError("only here")
        return Measurement({"value": torch.tensor(RANK / WORLD)})

    def summarise(self, total):
        return dict(total.sums)


class Complementary(TinyLM):
    """A ReLU layer of which unit 0 is silent on rank 0 only, unit 1 on rank 1 only, and unit 2 on both."""

    def __init__(self):
        super().__init__(lr=0.0, weight_decay=0.0)
        self.blocks.append(torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 16)))

    def training_step(self, batch, batch_idx):
        up = self.blocks[2][0]
        with torch.no_grad():
            up.weight[:3], up.bias[:3] = 0, 1.0
            up.bias[RANK] = up.bias[2] = -1.0
        return super().training_step(batch, batch_idx)


class Spoilt(TinyLM):
    """On rank 1 the hidden layer puts out infinities in the third batch."""

    def __init__(self):
        super().__init__(dropout=0.1, batch_norm=True)
        self.hidden.register_forward_hook(lambda module, args, output: output / 0 if self.spoil else output)

    def training_step(self, batch, batch_idx):
        self.spoil = RANK == 1 and batch_idx == 2
        return super().training_step(batch, batch_idx)


class Apart(TinyLM):
    """The micro-batches of a step have the losses 1 and 2 on rank 0; on rank 1 these are 5 and, at last, infinite."""

    def training_step(self, batch, batch_idx):
        late = self.trainer.global_step >= 10
        wanted = [5.0, float("inf") if late else 6.0][batch_idx % 2] if RANK == 1 else 1.0 + batch_idx % 2
        return 0 * super().training_step(batch, batch_idx) + wanted


class OneBranch(TinyLM):
    """Rank 1 never runs the second block."""

    def loss(self, batch):
        if RANK == 1:
            with torch.no_grad():
                self.blocks[1].attention.weight.zero_()
            self.blocks[1].forward = lambda x: x + 0 * x @ self.blocks[1].attention.weight[:16]
        return super().loss(batch)


OBSERVERS = [
    lambda: AttentionEntropyMonitor(1, per_head=True),
    lambda: DeadNeuronDetector(1, window_tokens=1),
    lambda: ActivationStatsMonitor(1),
    lambda: ParameterStatsLogger(1),
]


def fit(callbacks, root, faults=None, module=None, n_samples=64, **options):
    torch.manual_seed(0)
    module, logger = (module or TinyLM)(), MemoryLogger()
    trainer = make_trainer(
        strategy="ddp", devices=WORLD, use_distributed_sampler=False, logger=logger, callbacks=callbacks,
        default_root_dir=root, **{"max_epochs": 1, **options},
    )  # fmt: skip
    error = None
    try:
        trainer.fit(module, datamodule=Shards(batch_size=8, faults=faults, n_samples=n_samples))
    except DivergenceError as exception:
        error = str(exception)
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    return {
        "logged": logger.calls, "steps": trainer.global_step, "error": error, "weights": weights.double().sum().item(),
    }  # fmt: skip


def recover(out, strikes, faults):
    """A fit of 40 steps with recovery, and its history."""
    recovery = LossSpikeRecovery(
        RobustRule(window=20, least=10), snapshot_every_n_steps=10, prove_steps=5, max_rollbacks=2
    )
    injector = FaultInjector(strikes)
    found = fit([recovery, injector], out, faults, n_samples=320)
    if RANK == 1:
        injector.assert_all_fired()
    return {**found, "history": recovery.state_dict()["report"]["history"]}


def main(out):
    facts = {}
    for accumulate in (1, 4):
        curve = LossCurve(every_n_steps=1)
        callbacks = [GradientNormLogger(every_n_steps=1), curve]
        facts[f"norm_{accumulate}"] = fit(callbacks, out / "norm", accumulate_grad_batches=accumulate)
        facts[f"norm_{accumulate}"]["curve"] = curve.train.values
    guard = NonFiniteGuard()
    facts["nan"] = fit([guard], out / "nan", faults={5: "nan", 24: "gradient"})
    facts["nan"]["state"] = guard.state_dict()
    for name, callbacks in {"guarded": [], "autopsy": [NonFiniteAutopsy()]}.items():
        facts[name] = fit([NonFiniteGuard(), *callbacks], out / name, module=Spoilt)
    clipping = AdaptiveGradientClipping(z_threshold=0.2, max_grad_norm=0.6, warmup_steps=2, every_n_steps=1)
    facts["clipping"] = fit([clipping, NonFiniteGuard()], out / "clipping", faults={30: "nan"})
    facts["clipping"]["state"] = clipping.state_dict()
    facts["recovery"] = recover(out / "recovery", [Fault("nan_weight", step=27, rank=1)], {84: "nan", 244: "spike"})
    facts["stopped"] = recover(out / "stopped", [Fault("nan_weight", step=s, rank=1) for s in (20, 22, 24)], {})
    facts["patience"] = fit([NonFiniteGuard(patience=2)], out / "patience", faults=dict.fromkeys(range(30, 64), "nan"))
    failing = FailsOnRankOne()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        facts["failing"] = fit([failing], out / "failing")
    facts["failing"]["measured"] = failing.measured
    facts["failing"]["warned"] = [str(w.message) for w in caught if "is off" in str(w.message)]
    facts["observers"] = fit([make() for make in OBSERVERS], out / "observers")
    facts["plain"] = fit([], out / "plain")
    facts["complementary"] = fit([DeadNeuronDetector(1, window_tokens=1)], out / "dead", module=Complementary)
    monitors = [AttentionEntropyMonitor(1), ActivationStatsMonitor(1)]
    facts["one_branch"] = fit(monitors, out / "branch", module=OneBranch)
    facts["throughput"] = fit([ThroughputLogger(2)], out / "throughput", accumulate_grad_batches=2)
    dashboard = Dashboard(every_n_steps=3)
    facts["dashboard"] = fit([GradientNormLogger(1), AttentionEntropyMonitor(1), dashboard], out / "dashboard")
    facts["dashboard"] |= {"heard": sorted(dashboard.state_dict()["curves"]), "judged": dashboard.diagnosis is not None}
    dashboard = Dashboard()
    fit([dashboard], out / "judged", module=Apart, n_samples=240, accumulate_grad_batches=2)
    facts["judged"] = dict(dashboard.state_dict()["curves"].get("train/loss", {}).get("recent", []))
    (out / f"rank_{RANK}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
