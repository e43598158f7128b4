"""The chunked scan and the factor updates against the recurrence as it is written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twotower_kernels.scan import apply_factors, chunk_scan, chunk_scan_ref


def _inputs(batch: int, length: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    heads, head_dim, groups, n = 4, 6, 2, 5
    x = scale * torch.randn(batch, length, heads, head_dim, generator=g)
    dt = torch.rand(batch, length, heads, generator=g) * 2
    a = -torch.rand(heads, generator=g) * 3
    b, c = (torch.randn(batch, length, groups, n, generator=g) for _ in range(2))
    state = scale * torch.randn(batch, heads, head_dim, n, generator=g)
    return x, dt, a, b, c, state


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("chunk", [1, 7, 16, 128])
def test_chunks_equal_the_recurrence(length: int, chunk: int) -> None:
    x, dt, a, b, c, state = _inputs(3, length)
    y, final, starts = chunk_scan(x, dt, a, b, c, state, chunk)
    y_ref, final_ref = chunk_scan_ref(x, dt, a, b, c, state)
    torch.testing.assert_close(y, y_ref, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, final_ref, rtol=1e-4, atol=1e-4)
    for i in range(starts.shape[1]):
        before = min(i * min(chunk, length), length)
        expected = chunk_scan_ref(x[:, :before], dt[:, :before], a, b[:, :before], c[:, :before], state)[1] if before else state
        torch.testing.assert_close(starts[:, i], expected, rtol=1e-4, atol=1e-4)


def test_a_block_shorter_than_the_chunk_is_seeded() -> None:
    x, dt, a, b, c, state = _inputs(2, 16)
    y, _, _ = chunk_scan(x, dt, a, b, c, state, 128, need_states=False)
    torch.testing.assert_close(y, chunk_scan_ref(x, dt, a, b, c, state)[0], rtol=1e-4, atol=1e-4)
    unseeded, _, _ = chunk_scan(x, dt, a, b, c, torch.zeros_like(state), 128, need_states=False)
    assert (y - unseeded).abs().max() > 0.1


def test_extreme_decays_stay_finite() -> None:
    x, dt, a, b, c, state = _inputs(1, 64, scale=1e3)
    y, final, _ = chunk_scan(x, dt * 200, a, b, c, state, 16)
    assert y.isfinite().all()
    assert final.isfinite().all()


def test_factors_equal_the_recurrence() -> None:
    x, dt, a, b, c, state = _inputs(1, 16)
    new = apply_factors(state[0], x[0], b[0], dt[0], a)
    torch.testing.assert_close(new, chunk_scan_ref(x, dt, a, b, c, state)[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_give_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    heads, head_dim, n, groups, length = 16, 64, 128, 4, 16
    x = torch.randn(length, heads, head_dim, generator=g).to(dtype)
    b = torch.randn(length, groups, n, generator=g).to(dtype)
    dt = torch.rand(length, heads, generator=g)
    a = -torch.rand(heads, generator=g)
    state = torch.randn(heads, head_dim, n, generator=g)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(apply_factors(state, x.clone(), b.clone(), dt.clone(), a))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    # and in two halves, as two commits
    half = apply_factors(apply_factors(state, x[:8], b[:8], dt[:8], a), x[8:], b[8:], dt[8:], a)
    assert torch.equal(half, results[0])
