"""docs/structure.md and the tree agree: a line for each module, a module for each line, and imports that point one way."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "structure.md"
PACKAGES = {
    "`services/twotower/`": ROOT / "services" / "twotower",
    "`kernels/twotower_kernels/`": ROOT / "kernels" / "twotower_kernels",
}

NO_GRPC = ("grpc", "redis", "subprocess", "multiprocessing", "starlette", "uvicorn")
SERVING = (
    "gateway",
    "context",
    "denoiser",
    "launcher",
    "broker",
    "rpc",
    "transport",
    "wire",
    "prefix",
    "client",
    "engine",
    "model",
)
MAY_NOT_IMPORT: dict[str, tuple[str, ...]] = {
    "model": (*NO_GRPC, "twotower.engine"),
    "engine": NO_GRPC,
    "gateway": ("torch",),
    "client": ("torch",),
    "broker": ("torch", "grpc"),
    "launcher": ("torch", "twotower.gateway.main", "twotower.context.main", "twotower.denoiser.main"),
}
"""By package of `twotower`: the last section of the page."""


def tables() -> Iterator[tuple[Path, Path, str]]:
    """(package, folder, name) of everything that the page's tables name; a folder's own row has the name ''."""
    package = folder = None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("|"):
            package = folder = next((path for key, path in PACKAGES.items() if line.startswith(key)), package)
            continue
        cell = line.partition("|")[2].partition("|")[0].strip()
        names = re.findall(r"`([^`]+)`", cell)
        if package is None or not names:
            continue
        if not cell.startswith("·"):
            folder = package
            if len(names) == 1 and names[0].endswith("/"):
                folder = package / names[0]
                yield package, folder, ""
                continue
        assert folder is not None
        for name in names:
            yield package, folder, name


def modules(package: Path) -> Iterator[Path]:
    """What needs a line: all modules but generated ones and those that only make a package."""
    for path in sorted(package.rglob("*.py")):
        if path.name not in ("__init__.py", "__main__.py") and "_pb2" not in path.name:
            yield path


def test_every_line_has_its_module() -> None:
    named = list(tables())
    assert len(named) > 100
    missing = [f"{folder.relative_to(ROOT)}/{name}" for _, folder, name in named if not (folder / name).exists()]
    assert not missing, f"docs/structure.md names what is not there: {missing}"


def test_every_module_has_its_line() -> None:
    files = {folder / name for _, folder, name in tables() if name.endswith(".py")}
    # A folder that is named among modules, or whose row no module follows, is described as a whole.
    folders = {folder for _, folder, name in tables() if not name}
    described = {folder for _, folder, name in tables() if name.endswith(".py")}
    whole = [folder / name for _, folder, name in tables() if name.endswith("/")] + sorted(folders - described)
    missing = [
        str(path.relative_to(ROOT))
        for package in PACKAGES.values()
        for path in modules(package)
        if path not in files and not any(path.is_relative_to(folder) for folder in whole)
    ]
    assert not missing, f"docs/structure.md has no line for: {missing}"


def test_a_package_with_modules_of_its_own_is_not_described_as_a_whole() -> None:
    """Else a row without modules would hide any number of them."""
    named = {folder for _, folder, name in tables() if name.endswith(".py")}
    short = {folder.relative_to(package).as_posix() for package, folder, name in tables() if not name and folder not in named}
    # Generated stubs and data; and kernels' other forms, whose modules are named as the plain ones.
    assert short <= {"v1", "internal/v1", "checkpoints", "cpu", "triton"}


def test_every_package_says_what_lives_there() -> None:
    for package in PACKAGES.values():
        for path in package.rglob("__init__.py"):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def imports(path: Path) -> set[str]:
    """Modules that a file names in its imports, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def of(names: set[str], *modules: str) -> set[str]:
    """Those that are one of these modules, or lie in one."""
    return {name for name in names if any(name == module or name.startswith(f"{module}.") for module in modules)}


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    for path in (PACKAGES["`services/twotower/`"] / package).rglob("*.py"):
        assert not of(imports(path), *MAY_NOT_IMPORT[package]), path


def test_nobody_imports_the_command_line_and_serving_nothing_that_measures() -> None:
    services = PACKAGES["`services/twotower/`"]
    for path in services.rglob("*.py"):
        package = path.relative_to(services).parts[0]
        if package != "cli":
            assert not of(imports(path), "twotower.cli"), path
        if package in SERVING:
            assert not of(imports(path), "twotower.train", "twotower.eval", "twotower.bench"), path


def test_kernels_know_nobody() -> None:
    for path in PACKAGES["`kernels/twotower_kernels/`"].rglob("*.py"):
        assert not of(imports(path), "twotower", "grpc", "redis"), path
