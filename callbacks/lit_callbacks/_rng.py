"""The random number generators of this process, saved and put back."""

import random
import sys
from typing import Any

import torch


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of the generators of torch, of the device, of Python, and of numpy where it is in use. No device sync.

    Example:
        >>> state = rng_state(torch.device("cpu"))
        >>> first = torch.rand(3)
        >>> set_rng_state(state, torch.device("cpu"))
        >>> torch.equal(torch.rand(3), first)
        True
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    if (numpy := sys.modules.get("numpy")) is not None:
        state["numpy"] = numpy.random.get_state()
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])


def plain_rng(state: dict[str, Any]) -> dict[str, Any]:
    """What :func:`rng_state` returned as data that loads with ``weights_only=True``: numpy's array becomes a list."""
    plain = dict(state)
    if "numpy" in plain:
        name, keys, *rest = plain["numpy"]
        plain["numpy"] = [name, keys.tolist(), *rest]
    return plain


def rng_state_of(plain: dict[str, Any]) -> dict[str, Any]:
    """What :func:`set_rng_state` takes, from what :func:`plain_rng` returned."""
    state = dict(plain)
    for name in ("torch", "device"):
        if name in state:
            state[name] = state[name].cpu()
    return {key: tuple(value) if key == "numpy" else value for key, value in state.items()}
