from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def hybrid_8l() -> Path:
    """Outputs of the published reference on a small random checkpoint: `MEM*EM*E`, fp32, greedy."""
    return DATA / "hybrid-8l"
