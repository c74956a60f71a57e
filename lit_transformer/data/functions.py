"""The classification task that every machine has: which package of the standard library is a function from?"""

import ast
from collections import Counter
from collections.abc import Iterator
from textwrap import dedent

from lit_transformer.data.corpus import Documents
from lit_transformer.data.splits import split_by_file

Sample = tuple[str, str]
"""A text and its label."""


def functions(documents: Documents, labels: list[str]) -> list[Sample]:
    r"""Every function of the packages in ``labels``, methods included, with its package.

    Args:
        documents: Source files by their path below the library.
        labels: The packages.

    Example:
        >>> functions({"email/a.py": b"def f():\n    return 1\n", "re.py": b"def g(): pass"}, ["email"])
        [('def f():\n    return 1', 'email')]
    """
    found = []
    for name, content in documents.items():
        package = _package(name)
        if package in labels:
            found += [(text, package) for text in _functions_of(content.decode())]
    return found


def split_packages(documents: Documents, packages: list[str], fractions: dict[str, float]) -> dict[str, Documents]:
    """Take whole files out of each package, so that every class is in every split."""
    splits: dict[str, Documents] = {}
    for package in packages:
        own = {name: content for name, content in documents.items() if _package(name) == package}
        for split, part in split_by_file(own, fractions).items():
            splits.setdefault(split, {}).update(part)
    return splits


def largest_packages(documents: Documents, n: int) -> list[str]:
    """The ``n`` packages with the most source, in alphabetical order; modules that stand alone are in none."""
    sizes: Counter[str] = Counter()
    for name, content in documents.items():
        if (package := _package(name)) is not None:
            sizes[package] += len(content)
    return sorted(package for package, _ in sizes.most_common(n))


def _package(name: str) -> str | None:
    package, slash, _ = name.partition("/")
    return package if slash else None


def _functions_of(source: str) -> Iterator[str]:
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
