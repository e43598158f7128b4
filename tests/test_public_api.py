"""What `__all__` names is there, documented, light to import, and what every version must keep."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import twotower
import twotower.client
from twotower import TwoTowerError

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = {
    "twotower": """
        Accepted Block BrokerUnavailable CheckpointError ConfigError DeadlineExceeded Draining Event FinishReason Finished
        Incompatible InvalidArgument Mode NonFiniteLogits Overloaded Priority RequestFailed ServiceFailed TokenLogprob
        TwoTowerError Unavailable __version__
    """,
    "twotower.client": "GatewayClient ModelInfo",
}
"""A name that leaves this list breaks a program somewhere: CHANGELOG.md has to say so."""


@pytest.mark.parametrize("module", [twotower, twotower.client])
def test_all_names_the_public_api(module: object) -> None:
    names: list[str] = module.__all__  # type: ignore[attr-defined]
    assert names == sorted(names)
    assert set(names) == set(PUBLIC[module.__name__].split())  # type: ignore[attr-defined]
    for name in names:
        value = getattr(module, name)
        assert not inspect.isclass(value) or inspect.getdoc(value), name


@pytest.mark.parametrize("method", ["generate", "model", "wait_ready", "close"])
def test_the_clients_methods_are_documented_and_typed(method: str) -> None:
    function = getattr(twotower.client.GatewayClient, method)
    assert inspect.getdoc(function)
    assert "return" in function.__annotations__


def test_errors_of_the_services_are_those_of_the_api() -> None:
    """Whatever `except twotower.TwoTowerError` is meant to catch."""
    errors = [value for name in twotower.__all__ if inspect.isclass(value := getattr(twotower, name))]
    assert sum(issubclass(error, TwoTowerError) for error in errors) == 13


@pytest.mark.parametrize(
    ("module", "heavy"), [("twotower", "torch grpc redis starlette"), ("twotower.client", "torch redis starlette")]
)
def test_the_api_is_light(module: str, heavy: str) -> None:
    code = f"import sys, {module}; print([name for name in {heavy.split()} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert twotower.__version__ == project["version"]
    assert f"\n## {twotower.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
