"""Two tasks that every machine has: from which package of the standard library is a function, and what does it do?"""

import ast
from collections import Counter
from collections.abc import Iterator
from textwrap import dedent

from lit_transformer.data.text.corpus import Documents
from lit_transformer.data.text.splits import split_by_file

Sample = tuple[str, str]
"""A text and what is to be said of it."""


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


def docstrings(documents: Documents) -> list[Sample]:
    r"""Every function that has a docstring, without it, and the docstring's first line.

    Args:
        documents: Source files by name.

    Example:
        >>> docstrings({"a.py": b"def f():\n    'Say one.'\n    return 1\n"})
        [('def f():\n    return 1', 'Say one.')]
    """
    found = []
    for content in documents.values():
        source = content.decode()
        lines = source.splitlines(keepends=True)
        for node in _function_nodes(source):
            said = ast.get_docstring(node)
            if said:
                first, rest = node.body[0], lines[node.lineno - 1 : node.end_lineno]
                start, end = first.lineno - node.lineno, (first.end_lineno or first.lineno) - node.lineno + 1
                if start:  # else all is on one line
                    found.append((dedent("".join(rest[:start] + rest[end:])).rstrip(), said.splitlines()[0].strip()))
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
    for node in _function_nodes(source):
        yield dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()


def _function_nodes(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
