"""Muon for the matrices inside of layers, AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """``torch.optim.Muon`` and ``torch.optim.AdamW`` with one learning rate, one state and one ``step``.

    Muon (Jordan et al. 2024) makes the update of a matrix orthogonal; vectors, embeddings and the output layer get
    AdamW. The updates of matrices are scaled to AdamW's size (``match_rms_adamw``, Liu et al. 2025, Moonlight), so that
    learning rate and weight decay are those of AdamW.

    Args:
        params: Groups with a key ``muon``, as :class:`~lit_transformer.optim.ParamGroups` makes them; without it, and
            for plain tensors, matrices get Muon.
        lr: The learning rate of both.
        weight_decay: Decoupled, of both.
        momentum: Of Muon.
        nesterov: Of Muon.
        ns_steps: Newton-Schulz iterations of Muon.
        betas: Of AdamW.
        eps: Of AdamW.

    Raises:
        ValueError: If a group with ``muon`` holds anything but matrices, or an argument is out of range.

    State: ``momentum_buffer`` of matrices, ``step``, ``exp_avg`` and ``exp_avg_sq`` of the rest.

    Cost: per matrix, ``ns_steps`` times three products of its smaller side; half of AdamW's memory.

    Example:
        >>> layer = torch.nn.Linear(4, 3)
        >>> [(group["muon"], len(group["params"])) for group in MuonAdamW(layer.parameters()).param_groups]
        [(True, 1), (False, 1)]
    """

    hidden_apart = True
    """For :meth:`ParamGroups.build`."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(_by_kind(list(params)), {"lr": lr, "weight_decay": weight_decay})
        muon, adamw = self._groups(True), self._groups(False)
        self._muon = Muon(
            muon, lr, weight_decay, momentum, nesterov, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw"
        ) if muon else None  # fmt: skip
        self._adamw = AdamW(adamw, lr, betas, eps, weight_decay) if adamw else None

    def _groups(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] == muon]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, muon in ((self._muon, True), (self._adamw, False)):
            if optimizer is not None:
                # What load_state_dict and snapshots put in place of groups and state is theirs too.
                optimizer.param_groups, optimizer.state = self._groups(muon), self.state
                optimizer.step()  # type: ignore[no-untyped-call]
        return loss


def _by_kind(params: list[Any]) -> list[dict[str, Any]]:
    """Groups that know whether they get Muon; those that do not are split by shape."""
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    found: list[dict[str, Any]] = []
    for group in groups:
        if "muon" in group:
            found.append(dict(group))
            continue
        tensors = list(group["params"])
        for muon in (True, False):
            some = [p for p in tensors if (p.ndim == 2) == muon]
            found += [{**group, "params": some, "muon": muon}] if some else []
    return found
