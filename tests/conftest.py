"""One thread of torch in every test process: several work side by side, and the matrices are small."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported anywhere, and for the processes that tests start


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="one more set of reference vectors to run; may be given several times",
    )
