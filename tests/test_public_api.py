"""What may import what, and what is public."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import lit_callbacks
import lit_transformer

REPOSITORY = Path(__file__).parents[1]
CALLBACKS = REPOSITORY / "callbacks" / "lit_callbacks"
TRANSFORMER = REPOSITORY / "lit_transformer"
STANDARD = set(sys.stdlib_module_names)
FUNCTIONAL = {"torch", "typing", "collections", "collections.abc"}
EVERYWHERE = {"torch", "lightning", "lightning_utilities", "torchmetrics"}


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def packages(path, top_level_only=False):
    return {name.partition(".")[0] for name in imports(path, top_level_only)} - STANDARD


def files(folder):
    found = sorted(folder.rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files(TRANSFORMER / "nn"), ids=lambda p: p.name)
def test_nn_is_pure_torch(path):
    assert packages(path) <= {"torch", "lit_transformer"}
    assert all(name.startswith("lit_transformer.nn") for name in imports(path) if name.startswith("lit_transformer"))


@pytest.mark.parametrize("path", files(CALLBACKS), ids=lambda p: p.name)
def test_callbacks_stand_alone(path):
    numbers = {"numpy"} if path.parent.name in ("health", "report") else set()  # they read files, and need no torch
    assert packages(path, top_level_only=True) <= EVERYWHERE | {"lit_callbacks"} | numbers
    assert "lit_transformer" not in packages(path)
    if path.parent.name == "functional":
        assert {name for name in imports(path) if not name.startswith("lit_callbacks.functional")} <= FUNCTIONAL


@pytest.mark.parametrize("path", files(TRANSFORMER), ids=lambda p: str(p.relative_to(TRANSFORMER)))
def test_lit_transformer_names_the_callbacks_in_its_command_line_alone(path):
    if path.parent.name != "commands" and path.name != "cli.py":
        assert "lit_callbacks" not in packages(path)


@pytest.mark.parametrize("package", [lit_transformer, lit_callbacks])
def test_public_names_are_sorted_exist_and_are_documented(package):
    assert package.__all__ == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__doc__, name


@pytest.mark.parametrize("folder", [TRANSFORMER, CALLBACKS], ids=["lit_transformer", "lit_callbacks"])
def test_every_module_says_what_it_is(folder):
    for path in files(folder):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_python_code_names_no_module_of_the_callbacks_folder():
    for folder in (TRANSFORMER, CALLBACKS, REPOSITORY / "tests", REPOSITORY / "benchmarks"):
        for path in files(folder):
            assert "callbacks" not in packages(path), path


def test_the_packages_have_no_import_cycle_at_import_time():
    for name in ("lit_transformer", "lit_callbacks", "lit_transformer.commands.training"):
        assert importlib.import_module(name)
