"""The sets that `--conformance DIR` names: too large, or too many, to ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower.cli.main import main


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sets: list[Path] = metafunc.config.getoption("--conformance")
    metafunc.parametrize("given", sets, ids=[path.name for path in sets])


@pytest.mark.parametrize("options", ["--local", "--services --denoisers 1", "--services --denoisers 3 --concurrency 8"])
def test_a_given_set(given: Path, options: str) -> None:
    assert main(["conformance", str(given), *options.split()]) == 0
