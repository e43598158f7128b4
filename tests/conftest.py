"""What must be set before torch is imported: several processes work side by side, with small matrices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported anywhere, and for the processes that tests start
if not Path("/dev/nvidiactl").exists():  # without a GPU, Triton's interpreter runs the kernels
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported anywhere: torch's compiler does so, too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # late: it takes a second, and most runs select no such test

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="one more set of reference vectors to run; may be given several times",
    )
