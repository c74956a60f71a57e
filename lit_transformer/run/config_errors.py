"""jsonargparse's nested error reports as one sentence: which key, what is wrong with it, and the nearest right name."""

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Iterable

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_SCAFFOLD = re.compile(
    r"^(- )?(Does not validate against any|Subtypes:|Errors:|Given value|Problem with given class_path"
    r"|Expected a <class 'NoneType'>|Parser key )"
)
_UNKNOWN_KEY = re.compile(
    r"unrecognized arguments: (?P<flags>\S.*)|(?:Group '(?P<group>[^']+)'|Subcommand '[^']+') does not accept option "
    r"'(?P<option>[^']+)'|(?:Option|Key) '(?P<key>[^']+)' is not (?:accepted|expected)"
)
_UNKNOWN_CLASS = re.compile(r"module '([^']+)' has no attribute '([^']+)'|No module named '([^']+)'")
_LITERAL = re.compile(r"Expected a typing\.Literal\[(.*)\]\. Got value: (.*)")
_TYPE = re.compile(r"Expected a <class '([^']+)'>\. Got value: (.*)")
_LINK = re.compile(
    r"Call to compute_fn of link '.*' with args \(.*?\) failed: ", re.DOTALL
)  # what the data itself refuses
_EXPLAINED = re.compile(r"(unknown key |)([\w.]+(?:; did you mean .*| must be .*|))$")


def explain(message: str, known_keys: Iterable[str] = ()) -> str:
    """One sentence for a report of jsonargparse.

    Args:
        message: What the parser said, over many indented lines.
        known_keys: Keys of the parser, to find the nearest one to a misspelt key.

    Example:
        >>> explain("unrecognized arguments: --trainer.max_stepz=5", ["trainer.max_steps", "seed_everything"])
        'unknown key trainer.max_stepz; did you mean trainer.max_steps?'
        >>> explain("unrecognized arguments: --modle.init_args.config.n_layers=5", ["model", "seed_everything"])
        'unknown key modle.init_args.config.n_layers; did you mean model.init_args.config.n_layers?'
    """
    message = _LINK.sub("", message)
    where = ".init_args.".join(dict.fromkeys(_KEY.findall(message)))
    class_path = (_CLASS.findall(message) or [""])[-1]
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    causes = [line for line in lines if line and not _SCAFFOLD.match(line)]
    cause = " ".join(dict.fromkeys(causes)) or " ".join(lines)

    if found := _UNKNOWN_KEY.search(cause):
        flags = [
            word.removeprefix("--").partition("=")[0] for word in (found["flags"] or "").split() if word[:2] == "--"
        ]
        key = flags[0] if flags else ".".join(filter(None, (found["group"], found["option"] or found["key"])))
        candidates = _accepted_by(class_path) if class_path else known_keys
        full = f"{where}.init_args.{key}" if where else key
        return f"unknown key {full}{_did_you_mean(key, candidates)}"
    if found := _UNKNOWN_CLASS.search(cause):
        module, name, missing = found.groups()
        given = class_path or (f"{module}.{name}" if module else missing)
        return f"{where + ': ' if where else ''}no class {given}{_nearest_class(given)}"
    if found := _LITERAL.search(cause):
        choices = found[1].replace("'", "")
        return f"{where} must be one of {choices}, got {found[2]}{_did_you_mean(found[2], choices.split(', '))}"
    if found := _TYPE.search(cause):
        return f"{where} must be of type {found[1]}, got {found[2]}"
    # The parser of a nested class has explained it already, but does not know where it stands.
    if where and (found := _EXPLAINED.match(cause)):
        return f"{found[1]}{where}.init_args.{found[2]}"
    return f"{where}: {cause}" if where and where not in cause else cause


def _did_you_mean(given: str, candidates: Iterable[str]) -> str:
    candidates = list(candidates)
    close = difflib.get_close_matches(given, candidates, n=1, cutoff=0.5)
    if not close:  # of a key far inside, whose first part is what the parser knows
        first, dot, rest = given.partition(".")
        known = {candidate.partition(".")[0] for candidate in candidates}
        close = [near + dot + rest for near in difflib.get_close_matches(first, sorted(known), n=1)]
    return f"; did you mean {close[0]}?" if close and close[0] != given else ""


def _accepted_by(class_path: str) -> list[str]:
    """Arguments of a class and of its bases, those of dataclass arguments as ``argument.field``."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    accepted: list[str] = []
    for parameter in inspect.signature(cls).parameters.values():
        accepted.append(parameter.name)
        if dataclasses.is_dataclass(parameter.annotation):
            accepted += [f"{parameter.name}.{field.name}" for field in dataclasses.fields(parameter.annotation)]
    return accepted


def _nearest_class(given: str) -> str:
    module_name, _, name = given.rpartition(".")
    if module_name == "callbacks":
        return f"; the import name of the callbacks folder is lit_callbacks, did you mean lit_callbacks.{name}?"
    for place in (module_name, "lit_transformer", "lit_callbacks", "torch.optim"):
        try:
            module = importlib.import_module(place)
        except (ImportError, ValueError):
            continue
        classes = [n for n, member in vars(module).items() if inspect.isclass(member)]
        if close := difflib.get_close_matches(name, classes, n=1, cutoff=0.6):
            return f"; did you mean {place}.{close[0]}?"
    return "; give the full path, package.module.Class, of something that can be imported"
