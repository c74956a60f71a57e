"""What a model costs before it is trained: parameters, floating-point operations, and memory.

Shapes: B batch, T length, S length of the source, L layers, D d_model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_transformer.nn.attention import CrossAttention, SelfAttention
from lit_transformer.nn.classifier import DecoderClassifier, EncoderClassifier
from lit_transformer.nn.stack import Stack
from lit_transformer.nn.transformer import EncoderDecoder

_PARTS = ("cross_attention", "attention", "feed_forward", "head")


@dataclass(frozen=True)
class Summary:
    """What :func:`summarize` has found.

    Args:
        parameters: How many there are, by part; a matrix that is embedding and output layer counts as an embedding.
        trainable: Likewise, those that need a gradient.
        flops_per_token: Of a forward and a backward pass; of an encoder-decoder, per token of the target.
        weight_bytes: All parameters.
        gradient_bytes: Those that are trained.
        optimizer_bytes: AdamW's two moments of each of these.
        activation_bytes: What the forward pass keeps for the backward pass, without activation checkpointing.
        checkpointed_bytes: Likewise, with ``activation_checkpointing=1``, and the block that is computed again.
    """

    parameters: Mapping[str, int]
    trainable: Mapping[str, int]
    flops_per_token: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    checkpointed_bytes: int

    @property
    def n_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def training_bytes(self) -> int:
        """Weights, gradients, AdamW and activations, without activation checkpointing."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    def describe(self) -> str:
        """A few lines for people."""
        saved = self.activation_bytes - self.checkpointed_bytes
        parts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        memory = (
            f"weights {_mib(self.weight_bytes)}, gradients {_mib(self.gradient_bytes)}, AdamW "
            f"{_mib(self.optimizer_bytes)}, activations {_mib(self.activation_bytes)}"
        )
        return (
            f"parameters: {self.n_parameters:,} ({parts}); {sum(self.trainable.values()):,} are trained\n"
            f"operations: {self.flops_per_token / 1e6:,.1f} MFLOPs a token, forward and backward\n"
            f"memory of a step: {_mib(self.training_bytes)} ({memory}); activation checkpointing saves {_mib(saved)}"
        )


def summarize(model: nn.Module, batch_size: int, length: int, source_length: int | None = None) -> Summary:
    r"""Count parameters and operations, and estimate the memory of a training step.

    Operations are those of matrix products, ``6 N + 12 L D T`` a token in a decoder (Kaplan et al. 2020, Chowdhery et
    al. 2022): N parameters in matrices that are multiplied with, the output layer included and embeddings not, twice
    for a multiplication and an addition, and twice that again in the backward pass. Attention counts in full where it
    is causal or has a window, too, as torch's counter does; what activation checkpointing computes again does not.

    Activations are those that autograd would keep for a cross-entropy, found by a forward pass on fake tensors, which
    hold no numbers. Kernels of other devices keep a little less: a dropout mask is a byte on a GPU and a number on a
    CPU. Under ``torch.autocast`` they are those of its precision. Not counted: what a kernel needs while it runs, and
    what the allocator holds back.

    Args:
        model: A transformer of :mod:`lit_transformer.nn`. It is left as it is.
        batch_size: B, sequences on a device in one pass.
        length: T, tokens of each; of an encoder-decoder, of the target.
        source_length: S, tokens of each source of an encoder-decoder; by default ``length``.

    Raises:
        ValueError: If a size is below 1, or the model takes no sequences of this length.

    Example:
        >>> from lit_transformer.nn import Transformer, TransformerConfig
        >>> summary = summarize(Transformer(TransformerConfig(d_model=64)), batch_size=8, length=128)
        >>> print(summary.describe().splitlines()[0])
        parameters: 232,832 (embedding 32,768, norm 1,152, attention 66,560, feed_forward 132,352); 232,832 are trained
    """
    source_length = length if source_length is None else source_length
    for name, size in (("batch_size", batch_size), ("length", length), ("source_length", source_length)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = (batch_size, length, source_length)
    kept, checkpointed = (sum(_kept(model, *sizes, every)) for every in (0, 1))
    n_blocks = sum(len(stack.blocks) for stack in _stacks(model))
    return Summary(
        parameters=_count(dict(model.named_parameters())),
        trainable=_count({name: p for name, p in model.named_parameters() if p.requires_grad}),
        flops_per_token=3 * _forward_flops(model, length, source_length) // length,
        weight_bytes=sum(p.nbytes for p in model.parameters()),
        gradient_bytes=sum(p.nbytes for p in trained),
        optimizer_bytes=2 * sum(p.nbytes for p in trained),
        activation_bytes=kept,
        checkpointed_bytes=checkpointed + (kept - checkpointed) // n_blocks,
    )


def _count(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, parameter in parameters.items():
        path = name.split(".")
        part = "norm" if path[-2].endswith("norm") else next((part for part in _PARTS if part in path), "embedding")
        found[part] = found.get(part, 0) + parameter.numel()
    return found


def _forward_flops(model: nn.Module, t: int, s: int) -> int:
    """Of one sequence."""
    classifies = isinstance(model, EncoderClassifier | DecoderClassifier)
    total = 0
    for name, module in model.named_modules():
        reads_source = isinstance(model, EncoderDecoder) and name.startswith("encoder.")
        rows = s if reads_source else t
        if isinstance(module, nn.Linear):
            if name.endswith("cross_attention.sublayer.kv"):
                rows = s
            elif classifies and name == "head":
                rows = 1
            total += 2 * rows * module.weight.numel()
        elif isinstance(module, SelfAttention):
            total += 4 * rows * rows * module.n_heads * module.head_dim
        elif isinstance(module, CrossAttention):
            total += 4 * rows * s * module.n_heads * module.head_dim
    return total


def kept_storages(model: nn.Module, forward: Callable[[Callable[..., Any]], Tensor]) -> list[int]:
    """Bytes of each storage that autograd holds for a backward pass, parameters and buffers not among them.

    Nothing is computed: tensors are fake, also those of a model on the meta device, which count as on a CPU.

    Args:
        model: Any module.
        forward: Is given what stands for the model, calls it with inputs, and returns logits.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a while to import

    tensors = {
        f"{name}.{own}".lstrip("."): tensor
        for name, module in model.named_modules()
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    with FakeTensorMode() as fake:
        held = {name: _on_a_device(fake.from_tensor(tensor)) for name, tensor in tensors.items()}
        own = {tensor.untyped_storage()._cdata for tensor in held.values()}
        seen: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                seen[storage._cdata] = storage
            return tensor

        def call(*inputs: Any, **named: Any) -> Any:
            return torch.func.functional_call(model, held, inputs, named, tie_weights=False)

        # A checkpoint holds its input out of sight.
        inputs = [
            block.register_forward_pre_hook(lambda _, args: (keep(args[0]), None)[1])
            for stack in _stacks(model)
            for block in stack.blocks
        ]
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                forward(call).log_softmax(-1).sum()
        finally:
            for hook in inputs:
                hook.remove()
    return [storage.nbytes() for storage in seen.values()]


def _on_a_device(fake: Tensor) -> Tensor:
    """Kernels of the meta device keep more than those of any other."""
    return torch.empty_like(fake, device="cpu").requires_grad_(fake.requires_grad) if fake.is_meta else fake


def activation_storages(model: nn.Module, batch_size: int, length: int, source_length: int | None = None) -> list[int]:
    """Bytes of each storage that a training step of a model keeps, activation checkpointing being as configured.

    With checkpointing, one number more is that of a block that is computed again.

    Args:
        model: As for :func:`summarize`; it may be on the meta device.
        batch_size: Likewise.
        length: Likewise.
        source_length: Likewise.
    """
    sizes = (batch_size, length, length if source_length is None else source_length)
    every = max(stack.config.activation_checkpointing for stack in _stacks(model))
    kept = _kept(model, *sizes, every)
    if not every:
        return kept
    n_checkpointed = sum(-(-len(stack.blocks) // every) for stack in _stacks(model))
    return [*kept, (sum(_kept(model, *sizes, every=0)) - sum(kept)) // n_checkpointed]


def _kept(model: nn.Module, b: int, t: int, s: int, every: int) -> list[int]:
    """What autograd holds at the end of a forward pass that checkpoints every ``every``-th block."""
    device = next(model.parameters()).device
    sizes = (s, t) if isinstance(model, EncoderDecoder) else (t,)

    def forward(call: Callable[..., Any]) -> Tensor:
        at = "cpu" if device.type == "meta" else device
        return call(*(torch.zeros(b, size, dtype=torch.long, device=at) for size in sizes))  # type: ignore[no-any-return]

    with _as_in_training(model, every):
        return kept_storages(model, forward)


@contextmanager
def _as_in_training(model: nn.Module, every: int) -> Iterator[None]:
    stacks, modes = _stacks(model), {module: module.training for module in model.modules()}
    configs = [stack.config for stack in stacks]
    try:
        model.train()
        for stack in stacks:
            stack.config = replace(stack.config, activation_checkpointing=every)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for stack, config in zip(stacks, configs, strict=True):
            stack.config = config


def _stacks(model: nn.Module) -> list[Stack]:
    return [module for module in model.modules() if isinstance(module, Stack)]


def _mib(n: int) -> str:
    return f"{n / 2**20:,.1f} MiB"
