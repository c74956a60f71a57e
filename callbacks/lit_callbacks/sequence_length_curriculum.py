"""Short sequences first: how long are those of this step?"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lit_callbacks._actor import Actor
from lit_callbacks._cadence import Cadence
from lit_callbacks._errors import SetupError
from lit_callbacks._events import say
from lit_callbacks._member import publish
from lit_callbacks._sequence_batch import SequenceBatch
from lit_callbacks.protocols import CanExpectShift
from lit_callbacks.recipe.plan import Plan

_SHIFT = 1.2  # times as long: the loss may be another one


class SequenceLengthCurriculum(Actor):
    """Train on short sequences first, and on ever longer ones (Li et al. 2022, *The Stability-Efficiency Dilemma*).

    The length of an epoch is ``min(start + growth * epoch, max_length)``, rounded down to a ``multiple_of``; with
    ``grow_every_n_steps`` it is that of the optimizer step. Either way it is a function of the step or epoch alone:
    the same on all ranks, in all micro-batches of a step and in a run that is resumed, and a step that is skipped or
    undone changes nothing about it. A batch that is shorter stays as it is, and validation, test and prediction have
    sequences in full.

    What is longer is cut off, as in the paper, so that a step sees fewer tokens in less time. With ``keep_tokens`` it
    is cut into pieces instead, so that a step sees as many tokens as ever (Press et al. 2021, *Shortformer*): T tokens
    become ``n = ceil(T / length)`` samples of ``T // n`` tokens, and those left over, fewer than ``n``, are cut off.
    That is for language modelling; a batch with one target a sample is refused. What a module makes of a sequence
    itself, such as targets that are the tokens moved on by one, it then makes of each piece.

    Batches are tensors, or mappings (Hugging Face's too), tuples, lists and dataclasses of them, batch first. T is that
    of ``input_ids``, else of the first integer tensor of two dimensions. What has T as its second dimension is cut:
    ids, targets, document ids; of a ``…mask`` of more dimensions all that are T. The rest is of whole samples. Where
    shape misleads, as with as many classes as tokens, or two sequences a sample, say in ``keys`` what to cut.

    * Padding on the left goes first: a sequence begins with its first token in ``attention_mask``.
    * Where all targets of the first tokens are -100, as in a long prompt, the sequence begins later, so that the first
      one that counts is in the middle.
    * Pieces without any token in ``attention_mask`` are dropped. All others are samples: ``sample_ids``, weights and
      whatever else a sample has is repeated, and ``position_ids`` begin anew.

    All callbacks see a batch as it is trained on: :class:`~lit_callbacks.ThroughputLogger` counts its tokens (and takes
    FLOPs for proportional to them), and :class:`~lit_callbacks.LossSpikeRecovery` runs it again. Where the length grows
    by a fifth or more, the latter is told to expect another loss: eight times the length at once would have cost it
    eleven skipped steps. ``torch.compile`` compiles once or twice more, and that serves all lengths, unless shapes are
    static (``dynamic=False``): then let it grow seldom, by much.

    Logs, every ``every_n_steps`` optimizer steps:
        curriculum/sequence_length: tokens of a sample.

    Args:
        start: Length at first.
        growth: Tokens by which it grows each time.
        grow_every_n_steps: Optimizer steps between two lengths; by default it grows by epochs.
        grow_every_n_epochs: Epochs between two lengths; by default 1.
        max_length: Greatest length; by default that of the batches.
        multiple_of: Lengths between ``start`` and ``max_length`` are rounded down to a multiple; 8 suits tensor cores.
        keep_tokens: Make pieces of sequences that are too long, instead of cutting them off.
        keys: Names of what is cut, of mappings, named tuples and dataclasses; by default by shape.
        every_n_steps: Optimizer steps between logged values.

    Raises:
        ValueError: If an argument is out of range, or both steps and epochs are given.
        SetupError: At setup, if ``training_step`` draws its own batches, under a strategy that shards, or beside
            another of its kind; at the first batch, if that has no token ids, or cannot be made pieces of.

    State: none: it follows from the step or epoch.

    Cost: on a CPU, 0.3 ms to cut a batch of 32 x 256 tokens, 0.06 ms to make pieces of it, 3 µs to leave it as it is; a
    read by the host with ``keep_tokens`` and an ``attention_mask``.

    Example:
        >>> curriculum = SequenceLengthCurriculum(start=128, growth=32, max_length=256)
        >>> [curriculum.length_at(step=0, epoch=epoch) for epoch in (0, 1, 2, 9)]
        [128, 160, 192, 256]
    """

    def __init__(
        self,
        start: int = 128,
        growth: int = 32,
        grow_every_n_steps: int | None = None,
        grow_every_n_epochs: int | None = None,
        max_length: int | None = None,
        multiple_of: int = 8,
        keep_tokens: bool = False,
        keys: list[str] | None = None,
        every_n_steps: int = 50,
    ) -> None:
        for name, value in (
            ("start", start),
            ("growth", growth),
            ("multiple_of", multiple_of),
            ("grow_every_n_steps", grow_every_n_steps),
            ("grow_every_n_epochs", grow_every_n_epochs),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if grow_every_n_steps is not None and grow_every_n_epochs is not None:
            raise ValueError(
                f"grow_every_n_steps must be left out where grow_every_n_epochs={grow_every_n_epochs} is given, got "
                f"{grow_every_n_steps}"
            )
        if max_length is not None and max_length < start:
            raise ValueError(f"max_length must be at least start={start}, got {max_length}")
        if keys is not None and not all(keys or [""]):
            raise ValueError(f"keys must be names, got {keys!r}")
        super().__init__()
        self.start, self.growth, self.max_length, self.multiple_of = start, growth, max_length, multiple_of
        self.grow_every_n_steps, self.grow_every_n_epochs = grow_every_n_steps, grow_every_n_epochs
        self.keep_tokens, self.keys, self.every_n_steps = keep_tokens, keys, every_n_steps
        self._cadence = Cadence(every_n_steps)
        self._length, self._is_first = 0, False

    def length_at(self, step: int, epoch: int) -> int:
        """The greatest length of a sequence in an optimizer step of an epoch, both counted from 0."""
        every = self.grow_every_n_steps
        times = epoch // (self.grow_every_n_epochs or 1) if every is None else step // every
        length = self.start + self.growth * times
        length = max(self.start, length - length % self.multiple_of)
        return length if self.max_length is None else min(length, self.max_length)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse batches that are never seen, and company."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise SetupError(
                "SequenceLengthCurriculum cannot cut batches that training_step draws itself, from dataloader_iter. "
                "Let training_step take a batch, or cut it there."
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, SequenceLengthCurriculum) for callback in callbacks) > 1:
            raise SetupError("Two SequenceLengthCurriculum callbacks would both cut. Keep one of them.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand where batches come from: the hooks of a callback can change a batch, but not replace it."""
        self._cadence.start(trainer.global_step)
        self._is_first = True
        strategy: Any = trainer.strategy
        strategy.batch_to_device = partial(self._shortened, trainer, strategy.batch_to_device)

    def _shortened(self, trainer: Trainer, move: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = move(*args, **kwargs)  # with the module's own hooks: what comes out is what training_step gets
        if not trainer.training or batch is None:
            return batch
        sequences = SequenceBatch(batch, self.keys)
        if self._is_first:
            self._is_first = False
            if self.keep_tokens:
                sequences.refuse_targets_of_samples()
            self._foresee(trainer, sequences.tokens)
        self._length = self.length_at(trainer.global_step, trainer.current_epoch)
        if self._length >= sequences.tokens:
            self._length = sequences.tokens
            return batch
        if not self.keep_tokens:
            return sequences.cut(self._length)
        pieces = math.ceil(sequences.tokens / self._length)
        self._length = sequences.tokens // pieces
        return sequences.fold(pieces)

    def _foresee(self, trainer: Trainer, tokens: int) -> None:
        """Say if the run ends before sequences are whole: validation would have tokens at places never trained."""
        steps = Plan(trainer, trainer.lightning_module).steps
        if steps is None:
            return
        per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        last = self.length_at(steps - 1, int((steps - 1) // math.ceil(per_epoch)) if math.isfinite(per_epoch) else 0)
        if last < min(tokens, self.max_length or tokens):
            last = tokens // math.ceil(tokens / last) if self.keep_tokens else last
            say(
                f"SequenceLengthCurriculum: this run of {steps} steps ends with sequences of {last} tokens, and the "
                f"data has {tokens}: let them grow by more or more often, or set max_length={last}."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Announce a step in length, and log if it is time."""
        step, epoch = trainer.global_step, trainer.current_epoch
        by_epochs = self.grow_every_n_steps is None
        before = self.length_at(step, epoch - (batch_idx == 0)) if by_epochs else self.length_at(step - 1, epoch)
        # Of the plan, not of the batch: all ranks must announce together, and may have padded to other lengths.
        if self.length_at(step, epoch) >= _SHIFT * before:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, CanExpectShift):
                    callback.expect_shift()
        if self._cadence.due(trainer.global_step):
            values = {"curriculum/sequence_length": float(self._length)}
            publish(trainer, pl_module, trainer.global_step, values, summary=())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step aside."""
        _step_aside(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Step aside."""
        super().on_exception(trainer, pl_module, exception)
        _step_aside(trainer)


def _step_aside(trainer: Trainer) -> None:
    vars(trainer.strategy).pop("batch_to_device", None)
