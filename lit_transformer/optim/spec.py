"""Factories as plain data, so that a checkpoint can hold them and be loaded without pickle."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any

Spec = dict[str, Any]


def factory_target(factory: Callable[..., Any]) -> Any:
    """What a factory calls: a class, if it is one that :func:`factory_spec` takes."""
    if not isinstance(factory, partial):
        return factory
    # jsonargparse puts the class behind its own instantiator: partial(call, instantiator, cls, **init_args).
    return factory.args[-1] if factory.args else factory.func


def factory_spec(factory: Callable[..., Any]) -> Spec:
    """A class, or a class with some arguments filled in, as ``{"class_path": ..., "init_args": {...}}``.

    Arguments that only repeat the class's defaults are left out, so that a factory from the command line, which spells
    all of them, equals the same one from Python.

    Args:
        factory: A class, or ``functools.partial`` of one with keyword arguments.

    Raises:
        ValueError: If it is anything else, such as a lambda, which no checkpoint could hold.

    Example:
        >>> import torch
        >>> factory_spec(partial(torch.optim.SGD, lr=0.1))
        {'class_path': 'torch.optim.sgd.SGD', 'init_args': {'lr': 0.1}}
    """
    target = factory_target(factory)
    keywords = dict(factory.keywords) if isinstance(factory, partial) else {}
    if not inspect.isclass(target):
        raise ValueError(
            f"expected a class or functools.partial(a class, name=value, ...), got {factory!r}; "
            "a checkpoint cannot hold other callables"
        )
    defaults = {name: p.default for name, p in inspect.signature(target).parameters.items()}
    init_args = {name: value for name, value in keywords.items() if name not in defaults or defaults[name] != value}
    return {"class_path": f"{target.__module__}.{target.__qualname__}", "init_args": init_args}


def instance_spec(instance: Any) -> Spec:
    """A dataclass instance in the same form."""
    if not is_dataclass(instance) or isinstance(instance, type):
        raise ValueError(f"expected an instance of a dataclass, which a checkpoint can hold as data, got {instance!r}")
    cls = type(instance)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": asdict(instance)}


def load_factory(spec: Mapping[str, Any]) -> Callable[..., Any]:
    """The factory that :func:`factory_spec` described."""
    module, _, name = spec["class_path"].rpartition(".")
    return partial(getattr(importlib.import_module(module), name), **spec.get("init_args", {}))
