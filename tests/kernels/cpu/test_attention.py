"""Attention in C++ against the plain form in fp64, over ragged shapes, strides and extreme inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twotower_kernels import attention as plain
from twotower_kernels.cpu.attention import attend
from twotower_kernels.cpu.build import load

pytestmark = pytest.mark.skipif(load() is None, reason="no AVX-512 BF16, or no compiler")


def _inputs(heads: int, kv_heads: int, length: int, keys: int, dim: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q as a projection gives it; k and v as views into room for more tokens, which holds NaN."""
    g = torch.Generator().manual_seed(heads + length + keys)
    q = (scale * torch.randn(1, length, heads, dim, generator=g)).bfloat16().transpose(1, 2)
    room = torch.full((2, kv_heads, keys + 9, dim), float("nan"), dtype=torch.bfloat16)
    room[:, :, :keys] = torch.randn(2, kv_heads, keys, dim, generator=g).bfloat16()
    k, v = room[:, :, :keys].unbind(0)
    return q, k.unsqueeze(0), v.unsqueeze(0)


def _check(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    with torch.inference_mode():
        out = attend(q, k, v, causal=causal)
        expected = plain.attend(q.double(), k.double(), v.double(), causal=causal)
    assert out.shape == q.shape
    assert out.isfinite().all()
    assert (out.double() - expected).abs().max() <= 1e-2 * expected.abs().max()
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "keys", "dim"),
    [
        (16, 2, 16, 144, 64),
        (32, 2, 16, 300, 128),  # the published heads: 256 queries of a KV head
        (4, 4, 5, 7, 32),
        (6, 2, 3, 70, 96),
        (9, 3, 17, 64, 32),
        (2, 1, 1, 1, 32),
        (8, 2, 1, 65, 64),
        (4, 2, 130, 193, 64),
    ],
)
def test_shapes(heads: int, kv_heads: int, length: int, keys: int, dim: int, causal: bool) -> None:
    _check(*_inputs(heads, kv_heads, length, keys, dim), causal=causal)


def test_large_scores() -> None:
    _check(*_inputs(4, 2, 16, 200, 64, scale=1e3), causal=False)


def test_what_is_not_seen_does_not_count() -> None:
    q, k, v = _inputs(4, 2, 16, 80, 64)
    before = _check(q, k, v, causal=True)
    v[:, :, -1] = 1e4
    k[:, :, -1] = 1e4
    assert torch.equal(_check(q, k, v, causal=True)[:, :, :-1], before[:, :, :-1])


def test_nan_stays() -> None:
    q, k, v = _inputs(2, 2, 4, 30, 32)
    k[0, 0, 11, 3] = float("nan")
    with torch.inference_mode():
        out = attend(q, k, v, causal=False)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


def test_bits_do_not_depend_on_threads() -> None:
    q, k, v = _inputs(16, 2, 40, 333, 64)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                results.append(attend(q, k, v, causal=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_does_not_fit_goes_the_plain_way() -> None:
    q, k, v = _inputs(4, 2, 3, 20, 40)  # 40 is no multiple of 32
    with torch.inference_mode():
        assert torch.equal(attend(q, k, v, causal=True), plain.attend(q, k, v, causal=True))
        wide = [t.float() for t in (q, k, v)]
        assert torch.equal(attend(*wide, causal=True), plain.attend(*wide, causal=True))


def test_heads_join_without_a_copy() -> None:
    out = _check(*_inputs(4, 2, 16, 30, 64), causal=False)
    assert out.transpose(1, 2).flatten(-2).data_ptr() == out.data_ptr()
