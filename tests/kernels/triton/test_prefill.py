"""The kernels over chunks of several prompts against plain torch, each chunk also against itself alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twotower_kernels import attention as plain_attention
from twotower_kernels import prefill as plain
from twotower_kernels.block import ScanWeights
from twotower_kernels.prefill import Segments

pytest.importorskip("triton")

from twotower_kernels.triton.common import interpreted
from twotower_kernels.triton.prefill import prefill_scan, prompt_attention

DEVICE = torch.device("cpu" if interpreted() else "cuda")
DTYPES = [torch.float32, torch.bfloat16]
KERNEL = 4


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _weights(
    heads: int, head_dim: int, groups: int, n: int, dtype: torch.dtype, *, bias: bool, limit: tuple[float, float]
) -> ScanWeights:
    channels = heads * head_dim + 2 * groups * n
    return ScanWeights(
        conv_weight=_draw(channels, 1, KERNEL).to(DEVICE, dtype),
        conv_bias=_draw(channels).to(DEVICE, dtype) if bias else None,
        dt_bias=_draw(heads, seed=1).to(DEVICE),
        a=-_draw(heads, seed=2).exp().to(DEVICE),
        d=_draw(heads, seed=3).to(DEVICE),
        norm=_draw(heads * head_dim).to(DEVICE),
        groups=groups,
        eps=1e-5,
        time_step_limit=limit,
    )


def _near(got: Tensor, expected: Tensor) -> None:
    assert got.isfinite().all()
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= (1e-5 if got.dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("lengths", [(1,), (3, 64, 1, 65), (150, 2)])
def test_scans_of_ragged_chunks(lengths: tuple[int, ...], pooled: bool, dtype: torch.dtype) -> None:
    _scan(lengths, (4, 16, 2, 16), dtype, pooled=pooled)


@pytest.mark.parametrize("sizes", [(3, 20, 1, 24), (4, 8, 4, 5)])
def test_sizes_that_are_no_powers_of_two(sizes: tuple[int, int, int, int]) -> None:
    _scan((70, 5), sizes, torch.float32, pooled=True, bias=False)


def test_the_real_sizes() -> None:
    _scan((66, 3), (4, 64, 1, 128), torch.bfloat16, pooled=False)


def test_limits_of_dt() -> None:
    _scan((17, 4), (4, 16, 2, 16), torch.float32, pooled=False, limit=(0.5, 0.75))


def _scan(
    lengths: tuple[int, ...],
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    pooled: bool,
    bias: bool = True,
    limit: tuple[float, float] = (0.0, math.inf),
) -> None:
    heads, head_dim, _, n = sizes
    weights = _weights(*sizes, dtype, bias=bias, limit=limit)
    segments, channels = Segments(lengths, DEVICE), weights.conv_weight.shape[0]
    # Rows of a wider tensor: they lie apart.
    projected = _draw(segments.total, heads * head_dim + channels + heads + 5).to(DEVICE, dtype)[:, 5:]
    rows = [5, 0, 3, 4][: len(lengths)] if pooled else list(range(len(lengths)))
    tails = _draw(6 if pooled else len(lengths), channels, KERNEL).to(DEVICE, dtype)
    ssm = _draw(tails.shape[0], heads, head_dim, n).to(DEVICE)
    slots = torch.tensor(rows, device=DEVICE) if pooled else None
    states = [(tails.clone(), ssm.clone()) for _ in range(3)]
    out = prefill_scan(projected, segments, *states[0], weights, chunk=16, slots=slots)
    expected = plain.prefill_scan(projected, segments, *states[1], weights, chunk=16, slots=slots)
    assert out.dtype is dtype
    _near(out, expected)
    assert torch.equal(states[0][0], states[1][0])
    _near(states[0][1], states[1][1])
    untouched = [row for row in range(tails.shape[0]) if row not in rows]
    assert torch.equal(states[0][1][untouched], ssm[untouched])
    for row, (start, end) in zip(rows, segments.spans, strict=True):
        mine = (states[2][0][row : row + 1], states[2][1][row : row + 1])
        alone = prefill_scan(projected[start:end], Segments([end - start], DEVICE), *mine, weights, chunk=16)
        assert torch.equal(out[start:end], alone)
        assert torch.equal(states[0][0][row], mine[0][0])
        assert torch.equal(states[0][1][row], mine[1][0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "contexts"), [((1,), (0,)), ((5, 64, 1, 65), (0, 70, 15, 16)), ((3, 130), (200, 0))])
def test_attention_of_ragged_chunks(lengths: tuple[int, ...], contexts: tuple[int, ...], dtype: torch.dtype) -> None:
    _attend(lengths, contexts, dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 16), (3, 1, 20), (10, 2, 64)])
def test_any_ratio_of_heads_and_a_dim_that_is_no_power_of_two(heads: int, kv_heads: int, dim: int) -> None:
    _attend((20, 7), (3, 40), torch.float32, heads=heads, kv_heads=kv_heads, dim=dim)


def test_the_real_heads() -> None:
    _attend((70, 2), (60, 0), torch.bfloat16, heads=32, kv_heads=2, dim=128, page=64)


def _attend(
    lengths: tuple[int, ...],
    contexts: tuple[int, ...],
    dtype: torch.dtype,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 32,
    page: int = 16,
) -> None:
    segments = Segments(lengths, DEVICE)
    q = _draw(segments.total, heads, dim).to(DEVICE, dtype).transpose(0, 1)  # as the projections give it
    used = [-(-(context + length) // page) for context, length in zip(contexts, lengths, strict=True)]
    shape = (2, sum(used) + 1, kv_heads, page, dim)
    k_pages, v_pages = torch.full(shape, math.nan, dtype=dtype, device=DEVICE).unbind(0)
    order = torch.randperm(sum(used) + 1, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.int32)
    table = torch.full((len(lengths), max(used)), 1 << 30, dtype=torch.int32, device=DEVICE)  # never to be followed
    for row, (context, length) in enumerate(zip(contexts, lengths, strict=True)):
        table[row, : used[row]] = order[sum(used[:row]) : sum(used[: row + 1])]
        for seed, pages in enumerate((k_pages, v_pages)):
            plain_attention.scatter_pages(
                pages, table[row], 0, _draw(kv_heads, context + length, dim, seed=seed).to(DEVICE, dtype)
            )
    before = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    out = prompt_attention(q, k_pages, v_pages, table, before, segments)
    expected = plain.prompt_attention(q.double(), k_pages.double(), v_pages.double(), table, before, segments)
    assert out.dtype is dtype
    _near(out, expected)
    assert out.transpose(0, 1).flatten(-2).data_ptr() == out.data_ptr()
    for row, (start, end) in enumerate(segments.spans):
        own = (table[row : row + 1], before[row : row + 1])
        alone = prompt_attention(q[:, start:end], k_pages, v_pages, *own, Segments([end - start], DEVICE))
        assert torch.equal(out[:, start:end], alone)
