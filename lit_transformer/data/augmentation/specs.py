"""Augmentations as plain data, for checkpoints and for comparing."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lit_transformer.errors import UsageError
from lit_transformer.optim.spec import Spec, load_factory

_PARAMETERS = ["self", "text", "generator"]


def to_spec(augmentation: Any) -> Spec | str:
    """The class and the arguments of an instance that keeps them as attributes of their names; else only a name.

    Args:
        augmentation: What is called.

    Example:
        >>> from lit_transformer.data.augmentation.sentence_shuffle import SentenceShuffle
        >>> to_spec(SentenceShuffle(0.3))["init_args"]
        {'probability': 0.3}
        >>> to_spec(str.upper)
        'str.upper'
    """
    if isinstance(augmentation, partial):
        arguments = [*map(_said, augmentation.args), *(f"{k}={_said(v)}" for k, v in augmentation.keywords.items())]
        return f"{to_spec(augmentation.func)}({', '.join(arguments)})"
    path = name_of(augmentation)
    if hasattr(augmentation, "__qualname__"):
        return path
    try:
        names = inspect.signature(type(augmentation)).parameters
    except ValueError:  # written in C
        return path
    arguments_ = {name: getattr(augmentation, name) for name in names if hasattr(augmentation, name)}
    if len(arguments_) == len(names) and all(map(_is_plain, arguments_.values())):
        return {"class_path": path, "init_args": arguments_}
    return f"{path}({', '.join(f'{name}={_said(value)}' for name, value in arguments_.items())})"


def from_spec(spec: Mapping[str, Any] | str) -> Any:
    """The augmentation that :func:`to_spec` described.

    Raises:
        UsageError: If it is only named, or is of a class that is none for augmentations, which is not run.
    """
    if isinstance(spec, str):
        raise UsageError(
            f"the augmentation {spec} is only known by name, since it is no class with plain arguments: give it as "
            "augmentations=[...], to go on with it, or give []"
        )
    path = spec.get("class_path", "")
    try:
        factory = load_factory({"class_path": path, "init_args": {}, **spec})
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"the augmentation {path!r} cannot be found: {error}") from None
    cls: Any = factory.func  # type: ignore[attr-defined]  # it is a partial
    call = next((vars(base)["__call__"] for base in getattr(cls, "__mro__", ()) if "__call__" in vars(base)), None)
    if call is None or list(inspect.signature(call).parameters) != _PARAMETERS:
        raise UsageError(f"expected a class with __call__(self, text, generator) for an augmentation, got {path}")
    return factory()


def say(specs: Sequence[Spec | str] | None) -> str | None:
    """A set of augmentations in one line.

    Example:
        >>> say([{"class_path": "lit_transformer.SentenceShuffle", "init_args": {"probability": 0.3}}, "mine.rewrite"])
        'SentenceShuffle(probability=0.3), mine.rewrite'
    """
    found = []
    for spec in specs or []:
        if isinstance(spec, Mapping):
            arguments = ", ".join(f"{name}={value!r}" for name, value in spec["init_args"].items())
            spec = f"{spec['class_path'].rpartition('.')[2]}({arguments})"
        found.append(spec)
    return ", ".join(found) or None


def name_of(augmentation: Any) -> str:
    """The path of a function or of an instance's class."""
    named = augmentation if hasattr(augmentation, "__qualname__") else type(augmentation)
    module = getattr(named, "__module__", None)
    return f"{module}.{named.__qualname__}" if module else str(named.__qualname__)


def _is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold it: no subclasses, such as numpy's numbers."""
    if type(value) is dict:
        return all(map(_is_plain, [*value.keys(), *value.values()]))
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def _said(value: Any) -> str:
    """The same in every process: no addresses."""
    return repr(value) if _is_plain(value) else str(to_spec(value)) if callable(value) else name_of(value)
