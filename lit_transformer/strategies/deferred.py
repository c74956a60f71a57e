"""Models without weights, that get them part by part: no device, and no host, ever has a large one whole.

While a model is made, each of its parameters goes to torch's meta device as soon as it is registered, and what would
have filled it is written down, with the random generator as it stood. Later each parameter is filled alone, by the same
draws: the numbers are those of a model that was made whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from lit_transformer.nn import TransformerConfig

_RANDOM = (torch.ops.aten.uniform_, torch.ops.aten.normal_)
_CONSTANT = (torch.ops.aten.fill_, torch.ops.aten.zero_)
_deferring: ContextVar[bool] = ContextVar("deferring", default=False)


@contextmanager
def deferred_weights() -> Iterator[None]:
    """Give no weights to the models of tasks that are made inside, until a Trainer knows which are whose.

    The command line does so under FSDP1 and 2, tensor parallelism and DeepSpeed.

    Example:
        >>> from lit_transformer import LitCausalLM
        >>> with deferred_weights():
        ...     task = LitCausalLM(TransformerConfig(d_model=16, n_layers=1, n_heads=2))
        >>> next(task.parameters()).is_meta
        True
    """
    token = _deferring.set(True)
    try:
        yield
    finally:
        _deferring.reset(token)


class _Step(NamedTuple):
    """A function that fills a part of a parameter in place."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    random: Tensor | None
    """The state of the generator before it, if it draws."""


class Draws(TorchDispatchMode):
    """What fills the parameters of a model that is made inside; nothing does so yet.

    Likewise what is copied into them inside, later on; it is held on to until then.

    Cost: the random numbers of the whole model, drawn and thrown away, so that what comes after has those it would have
    had; 5 KiB for each draw, until it is made.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # By storage, which is held on to: its number is not given to another one meanwhile.
        self._steps: dict[int, tuple[Tensor, list[_Step]]] = {}
        # A strategy may give a parameter another dtype, and thereby another storage, before it is filled.
        self._drawn: dict[nn.Parameter, Tensor] = {}
        self._scratch = torch.empty(0)

    def __exit__(self, *error: Any) -> None:
        """Give back the memory of what was thrown away."""
        self._scratch = self._scratch.new_empty(0)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Write down what is done to a tensor without memory."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        target, what = args[0] if args else None, func.overloadpacket
        if not isinstance(target, Tensor) or not target.is_meta:
            return out
        from_memory = what is torch.ops.aten.copy_ and not args[1].is_meta
        if what in (*_RANDOM, *_CONSTANT) or from_memory:
            random = torch.get_rng_state() if what in _RANDOM else None
            if random is not None:
                func(self._scratch_like(target), *args[1:], **kwargs)
            place = tuple(target.size()), target.stride(), int(target.storage_offset())
            self._of(target).append(_Step(func, args[1:], kwargs, *place, random))
        elif what is torch.ops.aten.clone:
            self._of(out)[:] = self._of(target)
        elif what is torch.ops.aten.copy_:
            self._of(target)[:] = self._of(args[1])
        return out

    def _scratch_like(self, tensor: Tensor) -> Tensor:
        """Always the same memory: an allocator keeps much of what comes and goes between small things that stay."""
        if self._scratch.dtype != tensor.dtype or len(self._scratch) < tensor.numel():
            self._scratch = torch.empty(tensor.numel(), dtype=tensor.dtype)
        return self._scratch[: tensor.numel()].view(tensor.shape)

    def _of(self, tensor: Tensor) -> list[_Step]:
        return self._steps.setdefault(tensor.untyped_storage()._cdata, (tensor, []))[1]

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's value, on the CPU if it has no memory yet, and then only once; the generator stays as it is.

        Raises:
            ValueError: If nothing has filled it.
        """
        if not parameter.is_meta:
            return parameter.detach()
        drawn = self._drawn.pop(parameter, parameter)
        storages = dict.fromkeys(tensor.untyped_storage()._cdata for tensor in (drawn, parameter))
        steps = [step for storage in storages for step in self._steps.pop(storage, (drawn, []))[1]]
        if not steps:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} was never initialised by torch.nn.init")
        value = torch.empty_like(drawn, device="cpu")  # torch.empty is another function inside of DeepSpeed's zero.Init
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for step in steps:
                if step.random is not None:
                    torch.set_rng_state(step.random)
                step.function(value.as_strided(step.size, step.stride, step.offset), *step.args, **step.kwargs)
        return value.to(parameter.dtype)

    def fill(self, module: nn.Module) -> None:
        """Give a module, and those inside, the parameters that have no memory yet; what was tied stays so."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
                if parameter.is_meta:
                    if parameter not in made:
                        made[parameter] = nn.Parameter(self.whole(parameter), parameter.requires_grad)
                    part.register_parameter(name, made[parameter])

    def without_memory(self, _module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        """What a module gets in place of a parameter that it registers."""
        if parameter is None or parameter.is_meta:  # tied to one that has been here
            return None
        placeholder = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        self._drawn[placeholder] = placeholder.detach()
        return placeholder


def make_model(network: Callable[[TransformerConfig], nn.Module], config: TransformerConfig) -> tuple[nn.Module, Draws]:
    """A model, and what fills it if it was made inside of :func:`deferred_weights`."""
    draws = Draws()
    if not _deferring.get():
        return network(config), draws
    hook = register_module_parameter_registration_hook(draws.without_memory)  # type: ignore[arg-type]
    try:
        with draws:
            return network(config), draws
    finally:
        hook.remove()
