"""What a person wants to read before and after training."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_transformer.module import LitTransformer
from lit_transformer.nn import generate
from lit_transformer.nn.summary import summarize
from lit_transformer.objectives import IGNORED
from lit_transformer.run.folder import RunFolder
from lit_transformer.strategies.sharded import shards, size_of
from lit_transformer.task import LitTask
from lit_transformer.tasks import LitCausalLM, LitPretrained, LitSeq2Seq

_SAMPLE_TOKENS = 200
_PROMPT_TOKENS = 24
_PAIRS = 5


class FitReport(Callback):
    """Print what will be trained on what, and at the end how it went, a sample, and where everything is.

    Args:
        run: The run's folder.
        precision: The precision and why, for the first lines.
        write_event: Called with the entries of an event when the model is no better than guessing at the end: before
            fit ends, so that it is part of every verdict on the run.
    """

    def __init__(self, run: RunFolder, precision: str, write_event: Callable[..., None]) -> None:
        self.run, self.precision, self._write_event = run, precision, write_event
        self._started = 0.0
        self._costs = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out what a step costs, before the model is compiled."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        source = next((n for name in ("block_size", "max_length") if (n := getattr(data, name, None))), None)
        batch_size = getattr(data, "batch_size", None)
        if stage != "fit" or not isinstance(pl_module, LitTransformer) or not source or not batch_size:
            return
        length = getattr(data, "max_target_length", source)
        if max(length, source) > pl_module.config.max_length:
            return  # which the module refuses
        with trainer.precision_plugin.forward_context():
            summary = summarize(pl_module.model, batch_size, length, source)
        self._costs = summary.describe().partition("\n")[2]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first lines."""
        self._started = time.monotonic()
        if not trainer.is_global_zero:
            return
        parameters = sum(size_of(p) for p in pl_module.parameters())
        frozen = sum(size_of(p) for p in pl_module.parameters() if not p.requires_grad)
        count = f"{parameters:,} parameters" + (f", {frozen:,} of them frozen" if frozen else "")
        print(f"Model: {type(pl_module).__name__}, {count}, {self._shape(pl_module)}")
        if self._costs:
            print(self._costs)
        describe = getattr(trainer.datamodule, "describe", None)  # type: ignore[attr-defined]
        if describe is not None:
            print(f"Data: {describe()}")
        print(f"Precision: {self.precision}")
        print(f"Run folder: {self.run.path}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last lines."""
        if not trainer.is_global_zero or trainer.interrupted:
            return
        minutes, seconds = divmod(round(time.monotonic() - self._started), 60)
        print(f"\nTrained to step {trainer.global_step} in {minutes} min {seconds:02d} s.")
        metrics = trainer.callback_metrics
        units = pl_module.objective.units if isinstance(pl_module, LitTask) else {"loss": "loss"}
        shown = [f"{float(metrics[f'val/{k}']):.4f} {unit}" for k, unit in units.items() if f"val/{k}" in metrics]
        if shown:
            print(f"Validation: {', '.join(shown)}.")
        self._print_baselines(trainer)
        if not shards(trainer.strategy):  # this rank alone has no whole model
            self._print_sample(trainer, pl_module)

    def _print_baselines(self, trainer: Trainer) -> None:
        """What a model has to be better than, where the data knows."""
        baselines = getattr(trainer.datamodule, "baselines", None)  # type: ignore[attr-defined]
        metrics = trainer.callback_metrics
        for baseline in [] if baselines is None else baselines():
            if (own := metrics.get(f"val/{baseline.metric}")) is not None:
                compared = f"{baseline.metric} {float(own):.4f}; {baseline.name}: {baseline.value:.4f}"
                print(f"  {compared}")
                if baseline.metric == "loss" and not float(own) < baseline.value:
                    self._write_event(
                        step=trainer.global_step,
                        event="recipe",
                        id="not-learning",
                        severity="warning",
                        text=f"the model is no better than what looks at no input: {compared}",
                        fix="Train for longer; look at warm-up and learning rate.",
                    )

    def print_places(self) -> None:
        """Where everything is; called when the last checkpoint has been written."""
        print(f"\nIn {self.run.path}:")
        contents = {
            "checkpoints/last.ckpt": "go on from here",
            "checkpoints/best*.ckpt": "lowest validation loss",
            "metrics.csv": "every logged number",
            "figures/*.png": "pictures",
            "tensorboard": "look at it with tensorboard --logdir",
            "wandb/offline-run-*": "send it with wandb sync",
            "events.jsonl": "what the callbacks did",
            "config.yaml": "the whole configuration",
        }
        for pattern, meaning in contents.items():
            for path in sorted(self.run.path.glob(pattern)):
                print(f"  {path.relative_to(self.run.path)!s:<40} {meaning}")

    def _print_sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, LitSeq2Seq):
            self._print_pairs(trainer, pl_module)
            return
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if not isinstance(pl_module, LitCausalLM) or tokenizer is None:
            return
        prompt = next(iter(trainer.datamodule.val_dataloader()))["input_ids"][0, :_PROMPT_TOKENS].tolist()  # type: ignore[attr-defined]
        pl_module.eval()
        tokens = list(generate(pl_module.model, prompt, _SAMPLE_TOKENS, temperature=0.8, top_k=50))
        pl_module.train()
        print(f"The first {_PROMPT_TOKENS} tokens of the validation text, and how the model goes on:\n")
        print(f"{tokenizer.decode(prompt)} ... {tokenizer.decode(tokens)}")

    @staticmethod
    def _print_pairs(trainer: Trainer, pl_module: LitSeq2Seq) -> None:
        decode = getattr(trainer.datamodule, "decode", None)  # type: ignore[attr-defined]
        if decode is None:
            return
        batch = next(iter(trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
        pl_module.eval()
        inputs = {key: batch[key][:_PAIRS].to(pl_module.device) for key in ("input_ids", "attention_mask")}
        written = pl_module.write(**inputs)
        pl_module.train()
        print(f"The first {len(written)} targets of the validation data, and what the model writes:\n")
        for ids, target in zip(written, batch["targets"], strict=False):
            wanted = decode([i for i in target.tolist() if i not in (IGNORED, pl_module.eos_id)])
            print(f"  {wanted}\n    {decode(ids)}")

    @staticmethod
    def _shape(pl_module: LightningModule) -> str:
        if isinstance(pl_module, LitPretrained):
            architecture = pl_module.architecture
            return f"{architecture['model_type']} for {pl_module.kind.replace('_', ' ')}"
        if not isinstance(pl_module, LitTransformer):
            return "of its own kind"
        config = pl_module.config
        layers = f"{config.n_layers} + {config.decoder_layers}" if pl_module.kind == "seq2seq" else config.n_layers
        return (
            f"{layers} layers x {config.d_model}, {config.n_heads} heads, {config.norm_placement}-norm, "
            f"{config.positions} positions"
        )


def metrics_table(metrics: Mapping[str, Tensor], first: str) -> str:
    """One metric a line, a blank line between sections; the section ``first`` comes first.

    Example:
        >>> import torch
        >>> print(metrics_table({"a/b": torch.tensor(1.0), "val/loss": torch.tensor(0.25)}, first="val"))
        val/loss  0.25000
        <BLANKLINE>
        a/b       1.00000
    """
    width = max(map(len, metrics), default=0)
    sections: dict[str, list[str]] = {first: []}
    for key in sorted(metrics):
        sections.setdefault(key.partition("/")[0], []).append(f"{key:<{width}}  {float(metrics[key]):.5f}")
    return "\n\n".join("\n".join(lines) for lines in sections.values() if lines)


def command_for(command: str, run: RunFolder, root: Path, checkpoint: str) -> str:
    """The command line that does something with a checkpoint of a run."""
    folder = [] if root == Path("runs") else ["--trainer.default_root_dir", str(root)]
    return f"{program_name()} {shlex.join([command, '--run', run.path.name, *folder, '--ckpt_path', checkpoint])}"


def program_name() -> str:
    """What was typed to get here: ``python cli.py`` in a checkout, ``lit-transformer`` where it is installed."""
    name = Path(sys.argv[0]).name
    return f"python {name}" if name.endswith(".py") else name
