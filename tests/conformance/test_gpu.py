"""The reference's outputs on a CUDA device, by Triton kernels and by plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower.conformance.run import run_local


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_the_reference_on_a_device(hybrid_8l: Path, kernels: str) -> None:
    misses: list[str] = []
    tally = run_local(hybrid_8l, misses.append, kernels=kernels)
    assert misses == []
    assert str(tally) == "43/43 cases, 23/23 states"
