"""The walls of the house: which package may import which, and what every package must have."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Imports run one way: each package may import those that come after it.
ORDER = ("cli", "actors", "elastic", "fault", "collectives")
# The one exception: elastic.Trainer is re-exported lazily from actors.
EXCEPTIONS = {("elastic/__init__.py", "actors")}
# What the ground floor must not know (DESIGN section 2).
STRANGERS = {
    "collectives": {"ray", "zmq", "msgpack", "prometheus_client", "click", "rich"},
    "fault": {"ray", "zmq", "msgpack", "prometheus_client", "click", "rich", "torch"},
    "elastic": {"ray", "click", "rich"},
    "actors": {"zmq", "msgpack", "click", "rich"},
}


def imported(path: Path) -> set[str]:
    """Top-level names that the file imports, anywhere in it, even inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no source"
    return found


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package: str) -> None:
    above = set(ORDER[: ORDER.index(package)])
    for path in sources(package):
        name = path.relative_to(ROOT).as_posix()
        wrong = {other for other in imported(path) & above if (name, other) not in EXCEPTIONS}
        assert not wrong, f"{name} imports {sorted(wrong)}, which stand above it"


@pytest.mark.parametrize("package", STRANGERS)
def test_each_floor_knows_only_what_it_may(package: str) -> None:
    for path in sources(package):
        wrong = imported(path) & STRANGERS[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("package", ORDER)
def test_every_package_is_typed_and_says_what_it_is(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    for path in sources(package):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} does not say what it is for"


def test_every_exported_name_exists() -> None:
    import collectives
    import elastic

    for package in (collectives, elastic):
        for name in package.__all__:
            assert getattr(package, name) is not None


def test_the_command_line_loads_neither_ray_nor_torch() -> None:
    code = "import sys, cli.main; print(sorted({'ray', 'torch', 'numpy', 'zmq'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.strip() == "[]"


def test_a_folder_that_shadows_a_sister_is_named(tmp_path: Path) -> None:
    shadow = tmp_path / "collectives"
    shadow.mkdir()
    (shadow / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import elastic"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert found.returncode == 1
    assert str(shadow) in found.stderr and "shadows" in found.stderr


def test_dependencies_are_those_that_the_project_promises() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "elastic-diloco"
    names = {requirement.split(">")[0].split("[")[0] for requirement in project["dependencies"]}
    promised = {
        "ray",
        "torch",
        "numpy",
        "pyzmq",
        "msgpack",
        "prometheus-client",
        "click",
        "rich",
        "xxhash",
        "safetensors",
        "fsspec",
    }
    assert names == promised
    assert project["scripts"] == {"elastic": "cli.main:main"}
