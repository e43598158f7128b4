from __future__ import annotations

import pytest

from twotower.gateway.bodies import body_limits

MB = 1 << 20


@pytest.mark.parametrize(
    ("context", "token_bytes", "expected"),
    [
        (512, 6, MB),
        (4096, 11, MB),
        (65_536, 4, 8 * MB),
        (262_144, 128, 8 * MB),
        (20_000, 16, 16 * 20_000 * 16),
        (512, None, 8 * MB),
    ],
)
def test_a_body_is_as_large_as_what_prompts_can_take(context: int, token_bytes: int | None, expected: int) -> None:
    assert body_limits(None, None, context, token_bytes) == (expected, 8 * expected)


def test_what_is_set_holds() -> None:
    assert body_limits(1000, None, 512, 6) == (1000, 8000)
    assert body_limits(None, 5000, 512, 6) == (MB, 5000)
    assert body_limits(1000, 5000, 512, 6) == (1000, 5000)
