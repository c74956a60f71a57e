"""The wheel holds both packages, the configurations, and nothing else."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "lit_transformer", "callbacks", "configs"):
        (source / name).symlink_to(REPOSITORY / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        folder,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


def test_top_level_is_exactly_the_two_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lit_transformer", "lit_callbacks"}
    assert {"lit_transformer/py.typed", "lit_callbacks/py.typed", "lit_transformer/configs/default.yaml"} <= set(names)
    assert "lit_transformer/configs/size/small.yaml" in names


def test_every_module_is_in_the_wheel_and_imports_from_it(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    roots = {"lit_transformer": REPOSITORY, "lit_callbacks": REPOSITORY / "callbacks"}
    modules = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for package, root in roots.items()
        for path in sorted((root / package).rglob("*.py"))
    ]
    script = (
        "import importlib, pathlib, sys\n"
        "from lit_transformer.run.config_files import find_config\n"
        "for name in sys.argv[2:]:\n"
        "    module = importlib.import_module(name)\n"
        "    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__\n"
        "assert pathlib.Path(find_config('default')).is_relative_to(sys.argv[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script, tmp_path, *modules], check=True, env=environment, cwd=tmp_path)
