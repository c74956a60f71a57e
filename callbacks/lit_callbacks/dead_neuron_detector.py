"""Which hidden units have stopped doing anything?"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_callbacks._deepspeed import gathered
from lit_callbacks._events import EventLog, run_folder
from lit_callbacks._forward_observer import ForwardObserver
from lit_callbacks._intercept import Call
from lit_callbacks._names import metric_key
from lit_callbacks._ranks import Measurement, side_by_side, tensor_parallel
from lit_callbacks._units import WRITTEN_OUT, UnitFollower, Units
from lit_callbacks.functional import silent_units

WEIGHT_DEAD = 1e-6
"""A row of incoming weights with a smaller norm than this is dead."""

TOKENS_PER_CALL = 256
"""Tokens of a layer that are looked at in a training forward pass, evenly spaced; all in ``validate`` and ``test``."""


class DeadNeuronDetector(ForwardObserver):
    r"""Log the shares of hidden units that are dead, dormant, or without weights: three quantities, never merged.

    Over a window of tokens, a unit is *dead* if it was exactly zero on every one (Voita et al. 2023, *Neurons in Large
    Language Models: Dead, N-gram, Positional*), which says something about ReLU and its relatives and hardly happens
    with GELU and SiLU; :math:`\tau`-*dormant* if its mean activity :math:`E|a|` is at most :math:`\tau` times the mean
    of its layer (Sokar et al., ICML 2023, *The Dormant Neuron Phenomenon in Deep Reinforcement Learning*), whatever the
    activation; and *weight-dead* if the norm of its incoming weights is below 1e-6. A small window finds more dead
    units than there are: its size is logged with them.

    Hidden units are found at the activation functions: ReLU and its relatives, GELU, SiLU and others, called as
    functions or as modules, and those that Hugging Face writes out. Of gated units, such as SwiGLU's, the product that
    enters the down-projection counts. ``<layer>`` is the linear layer that the units enter. A model in which none are
    seen gets a warning.

    Logs, when a window is full, and for all batches together in ``validate`` and ``test``:
        dead_neurons/<layer>: share of units that are dead.
        dead_neurons/window_tokens: tokens that this is said of, over all ranks.
        dormant_neurons/<layer>: share of units that are dormant.
        dormant_persistence/<layer>: share of the last window's dormant units that are dormant again; absent while there
            is no last window, or none were.
        weight_dead_neurons/<layer>: share of rows with a norm below 1e-6, of the matrices that make the units; absent
            where these were not seen.

    Args:
        every_n_steps: Optimizer steps between measurements.
        tau: Activity relative to the layer's mean up to which a unit is dormant.
        window_tokens: Tokens, over all ranks and measured steps, that make a window.
        write_indices: Also append the indices of dead and dormant units of each window to ``dead_neurons.jsonl`` in the
            run folder.

    Shapes:
        Activations ``(..., units)``; padded tokens count like others.

    Raises:
        ValueError: If an argument is out of range.

    State: the window so far, and the last window's dormant units.

    Cost: on measured steps a pass over at most 256 tokens of each hidden layer and over the matrices before them, and
    one read by the host; nothing on other steps.

    Example:
        >>> DeadNeuronDetector(tau=0.1).window_tokens
        2048
    """

    serves_shards = True
    serves_zero = True

    def __init__(
        self,
        every_n_steps: int = 50,
        tau: float = 0.025,
        window_tokens: int = 2048,
        write_indices: bool = False,
    ) -> None:
        super().__init__(every_n_steps)
        if not 0 < tau < 1:
            raise ValueError(f"tau must be between 0 and 1, got {tau}")
        if window_tokens < 1:
            raise ValueError(f"window_tokens must be at least 1, got {window_tokens}")
        self.tau = tau
        self.window_tokens = window_tokens
        self.write_indices = write_indices
        self._window: dict[str, Tensor] = {}
        self._window_step = 0
        self._dormant: dict[str, list[int]] = {}
        self._indices = EventLog()
        self._all_tokens = False
        self._warned = False
        self.discard()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder."""
        super().setup(trainer, pl_module, stage)
        self._all_tokens = stage != "fit"
        self._warned = False
        if self.write_indices:
            self._indices = EventLog(run_folder(trainer), "dead_neurons.jsonl")

    def discard(self) -> None:
        """Forget what has been seen."""
        self._follower: UnitFollower | None = None
        self._activity: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._dead_rows: dict[str, Tensor] = {}

    def handlers(self) -> dict[Callable[..., Any], Callable[[Call], None]]:
        """What a follower wants to see."""
        follower = self._follower = self._follower or UnitFollower(self._found)
        return {
            function: lambda call, handler=handler: self.attempt(handler, call)  # type: ignore[misc]
            for function, handler in follower.handlers().items()
        }

    def on_module(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Some activations are known by their module."""
        if type(module).__module__ == WRITTEN_OUT and self._follower is not None:
            self.attempt(self._follower.on_module, name, module, args, output)

    def on_end(self) -> None:
        """Units that entered no linear layer."""
        if self._follower is not None:
            self.attempt(self._follower.finish)
            self._follower = None

    @torch.no_grad()
    def _found(self, name: str, units: Units) -> None:
        values = units.values.detach().flatten(0, -2)
        if not self._all_tokens:
            values = values[:: -(-len(values) // TOKENS_PER_CALL)]
        activity = values.float().abs().sum(0)
        self._activity[name] = activity + self._activity[name] if name in self._activity else activity
        self._tokens[name] = len(values) + self._tokens.get(name, 0)
        if units.rows:  # now, while the weights are whole: after the forward pass FSDP gives them up
            with gathered([weight for weight, _ in units.rows]):
                norms = torch.cat([torch.linalg.vector_norm(weight.detach(), dim=dim) for weight, dim in units.rows])
            self._dead_rows[name] = (norms < WEIGHT_DEAD).float().mean().view(1)

    def collected(self, trainer: Trainer) -> Measurement:
        """Activities and tokens of this rank, and the shares of dead rows."""
        if not self._activity and not self._warned:
            self._warned = True
            rank_zero_warn(
                "DeadNeuronDetector saw no hidden units in this model: no activation function that it knows was called "
                "between linear layers; there is nothing it could log."
            )
        sharing = tensor_parallel(trainer)[1]  # ranks that have seen the same tokens, each with other units
        tokens = {
            f"tokens {name}": self._activity[name].new_tensor([number / sharing])
            for name, number in self._tokens.items()
        }
        units = {name: side_by_side(trainer, activity) for name, activity in self._activity.items()}
        # Else the same on all ranks that have seen a layer. In a fit rank zero's are logged, once the window is full.
        differ = self._all_tokens or sharing > 1
        rows = {name: side_by_side(trainer, share, -torch.inf) for name, share in self._dead_rows.items() if differ}
        return Measurement({**units, **tokens}, rows)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Remember which step the window ends with."""
        if self._measuring:
            self._window_step = trainer.global_step
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def summarise(self, total: Measurement) -> dict[str, Tensor]:
        """Add to the window; its shares, if it is full."""
        for name, values in total.sums.items():
            before = self._window.get(name)
            self._window[name] = values if before is None else values + before.to(values.device)
        tokens = [values for name, values in self._window.items() if name.startswith("tokens ")]
        full = tokens and (self._all_tokens or torch.cat(tokens).min() >= self.window_tokens)
        return self._close_window(total.maxima or self._dead_rows) if full else {}

    def _close_window(self, dead_rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = [*self._window.values(), *dead_rows.values()]
        on_host = torch.cat(parts).cpu().split([len(part) for part in parts])
        window = dict(zip([*self._window, *(f"rows {name}" for name in dead_rows)], on_host, strict=True))
        self._window = {}
        layers = [name for name in window if not name.startswith(("tokens ", "rows "))]
        values = {"dead_neurons/window_tokens": min(window[f"tokens {name}"][0] for name in layers)}
        for name in layers:
            key, (dead, dormant) = metric_key(name), silent_units(window[name], self.tau)
            values[f"dead_neurons/{key}"] = dead.float().mean()
            values[f"dormant_neurons/{key}"] = dormant.float().mean()
            if before := self._dormant.get(name):
                values[f"dormant_persistence/{key}"] = dormant[before].float().mean()
            self._dormant[name] = dormant.nonzero().flatten().tolist()
            if self.write_indices and self._dormant[name]:
                self._indices.write(
                    step=self._window_step, layer=name, tokens=int(window[f"tokens {name}"]), units=len(dormant),
                    dead=dead.nonzero().flatten().tolist(), dormant=self._dormant[name],
                )  # fmt: skip
        return values | {f"weight_dead_neurons/{metric_key(name)}": window[f"rows {name}"].mean() for name in dead_rows}

    def state_dict(self) -> dict[str, Any]:
        """The window so far, and the last one's dormant units."""
        return {
            "window": {name: values.tolist() for name, values in self._window.items()},
            "dormant": {name: list(units) for name, units in self._dormant.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on filling the window."""
        self._window = {name: torch.tensor(values) for name, values in state_dict["window"].items()}
        self._dormant = {name: list(units) for name, units in state_dict["dormant"].items()}
