"""The attention kernels over paged KV against the plain torch form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from twotower_kernels import attention as plain

pytest.importorskip("triton")

from twotower_kernels.triton.attention import block_attention
from twotower_kernels.triton.common import interpreted

pytestmark = pytest.mark.device

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """A batch of blocks, each with a context in pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_pages: Tensor
    v_pages: Tensor
    table: Tensor
    lengths: Tensor


def _case(
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    block: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    page: int = 16,
    q_scale: float = 1.0,
) -> Case:
    g = torch.Generator().manual_seed(sum(lengths))
    batch = len(lengths)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(DEVICE, dtype)

    # As the projections give them: (B, L, heads, d), heads moved in front.
    q = (q_scale * draw(batch, block, heads, dim)).transpose(1, 2)
    k, v = (draw(batch, block, kv_heads, dim).transpose(1, 2) for _ in range(2))
    used = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(used) + 1, generator=g).to(DEVICE, torch.int32)
    shape = (2, sum(used) + 1, kv_heads, page, dim)
    k_pages, v_pages = torch.full(shape, math.nan, dtype=dtype, device=DEVICE).unbind(0)
    table = torch.full((batch, max([*used, 1])), 1 << 30, dtype=torch.int32, device=DEVICE)  # never to be followed
    start = 0
    for row, length in enumerate(lengths):
        table[row, : used[row]] = order[start : start + used[row]]
        start += used[row]
        plain.scatter_pages(k_pages, table[row], 0, draw(kv_heads, length, dim))
        plain.scatter_pages(v_pages, table[row], 0, draw(kv_heads, length, dim))
    return Case(q, k, v, k_pages, v_pages, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))


def _check(case: Case, *, causal: bool = False, splits: int | None = None) -> Tensor:
    pages = (case.k_pages, case.v_pages)
    out = block_attention(case.q, case.k, case.v, *pages, case.table, case.lengths, causal=causal, splits=splits)
    q, k, v, *wide = (one.double() for one in (case.q, case.k, case.v, *pages))
    expected = plain.block_attention(q, k, v, wide[0], wide[1], case.table, case.lengths, causal=causal)
    assert out.dtype is case.q.dtype
    assert out.isfinite().all()
    error = (out.double() - expected).abs().max()
    assert error <= (1e-5 if out.dtype is torch.float32 else 1e-2) * expected.abs().max()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_ragged_contexts(splits: int, dtype: torch.dtype) -> None:
    _check(_case([0, 1, 15, 16, 17, 100], dtype), splits=splits)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_blocks_of_any_length(block: int, splits: int) -> None:
    _check(_case([0, 33], block=block), splits=splits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_real_heads(dtype: torch.dtype) -> None:
    _check(_case([200], dtype, heads=32, kv_heads=2, dim=128, page=64), splits=2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (10, 2)])
def test_any_ratio_of_heads_and_a_dim_that_is_no_power_of_two(heads: int, kv_heads: int) -> None:
    _check(_case([20, 3], block=5, heads=heads, kv_heads=kv_heads, dim=20), splits=2)


@pytest.mark.parametrize("splits", [1, 2])
def test_causal_in_the_block(splits: int) -> None:
    case = _case([0, 40], torch.bfloat16)
    causal = _check(case, causal=True, splits=splits)
    assert (causal[:, :, -1] - _check(case, splits=splits)[:, :, -1]).abs().max() < 1e-2  # the last sees all
    case.v[:, :, -1] = 1e4
    again = _check(case, causal=True, splits=splits)
    assert torch.equal(again[:, :, :-1], causal[:, :, :-1])


def test_large_scores_do_not_overflow() -> None:
    _check(_case([0, 50], q_scale=1e4), splits=3)


def test_more_splits_than_pages() -> None:
    _check(_case([0, 1, 40]), splits=16)


def test_splits_by_length() -> None:
    case = _case([1100, 7], heads=2, kv_heads=1, dim=16, block=2, page=64)
    whole = _check(case)  # two at this width
    args = (case.q, case.k, case.v, case.k_pages, case.v_pages, case.table, case.lengths)
    bounded = block_attention(*args, max_length=1100)
    torch.testing.assert_close(bounded, whole)


def test_the_output_joins_its_heads_without_a_copy() -> None:
    case = _case([5])
    out = _check(case)
    assert out.transpose(1, 2).flatten(-2).data_ptr() == out.data_ptr()


def test_a_batch_without_rows() -> None:
    case = _case([])
    out = block_attention(case.q, case.k, case.v, case.k_pages, case.v_pages, case.table, case.lengths)
    assert out.shape == case.q.shape
