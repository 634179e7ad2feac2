"""What a user gets from `pip install`: quick imports, complete wheels, no pickle."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"xmc": ROOT / "xmc", "xmc_kernels": ROOT / "kernels" / "xmc_kernels"}


def run(*command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["xmc", "xmc_kernels"])
def test_importing_a_package_loads_no_slow_library(package, tmp_path):
    # Against `import torch` alone, which is free to load triton.
    script = f"""
import json, sys, torch
before = set(sys.modules)
import {package}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""
    loaded = set(json.loads(run("-c", script, cwd=tmp_path)))
    assert package in loaded
    slow = {"numba", "llvmlite", "triton", "transformers", "tokenizers", "matplotlib", "sklearn"}
    assert not loaded & slow


def test_folders_named_like_other_packages_cannot_be_imported():
    # Without __init__.py they would still be namespace packages of a root on sys.path.
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path], (
        "the repository root is on sys.path: run `pytest`, not `python -m pytest`"
    )
    for name in ("datasets", "kernels"):
        assert not (ROOT / name / "__init__.py").exists()
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        assert not any(ROOT / name in Path(place).parents for place in places if place)
        assert str(ROOT / name) not in places


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a left-over build/ folder must not fill the gaps of a package list."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("xmc", "kernels", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_source_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for package, folder in SOURCES.items():
        expected = {
            f"{package}/{path.relative_to(folder)}"
            for path in folder.rglob("*")
            if path.suffix == ".py" or path.name == "py.typed"
        }
        assert f"{package}/py.typed" in expected
        assert not expected - names
    recipes = {f"xmc/recipes/{path.name}" for path in (ROOT / "scripts" / "recipes").glob("*.toml")}
    assert "xmc/recipes/quickstart.toml" in recipes
    assert not recipes - names
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"xmc", "xmc_kernels"}


def test_an_installed_wheel_works_away_from_the_source(wheel, tmp_path):
    target = tmp_path / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target)
    run(*install, wheel, cwd=tmp_path)
    script = """
import xmc, xmc_kernels
from xmc.config import load_recipe
print(xmc.__file__)
print(xmc_kernels.__file__)
print(load_recipe("quickstart").encoder.kind)
"""
    home, kernels, kind = run("-c", script, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert Path(home) == target / "xmc" / "__init__.py"
    assert Path(kernels) == target / "xmc_kernels" / "__init__.py"
    assert kind == "bag"
    (entry_points,) = target.glob("*.dist-info/entry_points.txt")
    assert "xmc = xmc.cli:main" in entry_points.read_text()


PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def pickle_uses(source):
    """The lines of a module that could load or store a pickle."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if modules == ["torch"]:
                modules = [f"torch.{alias.name}" for alias in node.names]
        bad = any(
            module.partition(".")[0] in PICKLERS or module in ("torch.load", "torch.save")
            for module in modules
        )
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            bad |= called == "torch.load" and given.get("weights_only") != "True"
            bad |= called == "torch.save" or called.endswith("read_pickle")
            bad |= given.get("allow_pickle", "False") != "False"
        if bad:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from joblib.numpy_pickle import load",
        "from torch import Tensor, load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "torch.save(state, path)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=flag)",
        "np.save(path, values, allow_pickle=True)",
    ],
)
def test_the_search_for_pickle_finds(source):
    assert pickle_uses(f"x = 1\n{source}\n") == [2]


def test_the_search_for_pickle_lets_pass_what_is_safe():
    safe = "np.load(path)\nnp.load(p, allow_pickle=False)\ntorch.load(p, weights_only=True)\n"
    assert pickle_uses(safe + "from torch import Tensor\nload(pointer)\n") == []


def test_no_package_reads_or_writes_pickles():
    files = [path for folder in SOURCES.values() for path in sorted(folder.rglob("*.py"))]
    assert len(files) > 20
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in files
        for line in pickle_uses(path.read_text("utf-8"))
    }
    assert not found
