"""The CPU's block scan against plain torch, and its deltas against them to the bit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from twotower_kernels import block as plain
from twotower_kernels import prefill
from twotower_kernels.block import ScanWeights
from twotower_kernels.cpu import factors as cpu_factors
from twotower_kernels.cpu import mamba as cpu
from twotower_kernels.cpu.build import load
from twotower_kernels.prefill import Segments
from twotower_kernels.scan import apply_factors_

pytestmark = pytest.mark.skipif(load() is None, reason="no AVX-512 BF16, or no compiler")

CPU = torch.device("cpu")
HEADS, HEAD_DIM, GROUPS, STATE = 4, 32, 2, 48
CHANNELS = HEADS * HEAD_DIM + 2 * GROUPS * STATE


@dataclass(frozen=True)
class Case:
    projected: Tensor
    tail: Tensor
    ssm: Tensor
    weights: ScanWeights


def case(batch: int, length: int, *, kernel: int = 4, bias: bool = True, weight_dtype: torch.dtype = torch.bfloat16) -> Case:
    g = torch.Generator().manual_seed(100 * batch + length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    weights = ScanWeights(
        conv_weight=draw(CHANNELS, 1, kernel).to(weight_dtype),
        conv_bias=draw(CHANNELS).to(weight_dtype) if bias else None,
        dt_bias=draw(HEADS),
        a=-draw(HEADS).exp(),
        d=draw(HEADS),
        norm=draw(HEADS * HEAD_DIM),
        groups=GROUPS,
        eps=1e-5,
        time_step_limit=(0.0, math.inf),
    )
    return Case(
        draw(batch, length, HEADS * HEAD_DIM + CHANNELS + HEADS).bfloat16(),
        draw(batch, CHANNELS, kernel).bfloat16(),
        draw(batch, HEADS, HEAD_DIM, STATE),
        weights,
    )


def close(got: Tensor, expected: Tensor) -> None:
    """bf16 on both sides: a rounding may fall the other way here and there."""
    error = (got.float() - expected.float()).abs().max().item()
    assert error <= 1e-2 * expected.float().abs().max().item(), error


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 33, 64])
def test_as_plain_torch(batch: int, length: int) -> None:
    c = case(batch, length)
    before = c.tail.clone(), c.ssm.clone()
    out = cpu.block_scan(c.projected, c.tail, c.ssm, c.weights)
    close(out, plain.block_scan(c.projected, c.tail, c.ssm, c.weights))
    assert torch.equal(c.tail, before[0])
    assert torch.equal(c.ssm, before[1])
    committed, factors = cpu.block_scan_commit(c.projected, c.tail, c.ssm, c.weights)
    close(committed, out)  # the sums are of another order: see `block_scan_factors`
    tail, ssm = before[0].clone(), before[1].clone()
    _, expected = plain.block_scan_commit(c.projected, tail, ssm, c.weights)
    close(factors.x, expected.x)
    close(factors.b, expected.b)
    torch.testing.assert_close(factors.dt, expected.dt, rtol=1e-5, atol=1e-7)
    assert torch.equal(factors.conv, expected.conv)
    assert torch.equal(c.tail, expected.conv)
    close(c.ssm, ssm)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pieces", [(1,) * 16, (5, 1, 10), (15, 1), (3, 13)])
def test_a_commit_has_the_bits_of_smaller_ones(pieces: tuple[int, ...], threads: int) -> None:
    c = case(3, sum(pieces))
    tail, ssm, at, outs = c.tail.clone(), c.ssm.clone(), 0, []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for length in pieces:
            piece = c.projected[:, at : at + length]
            out, _ = cpu.block_scan_commit(piece, tail, ssm, c.weights)
            outs.append(out)
            at += length
        whole, _ = cpu.block_scan_commit(c.projected, c.tail, c.ssm, c.weights)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(outs, 1), whole)
    assert torch.equal(tail, c.tail)
    assert torch.equal(ssm, c.ssm)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_prompts(length: int) -> None:
    c = case(1, length)
    tail, ssm, segments = c.tail.clone(), c.ssm.clone(), Segments([length], CPU)
    expected = prefill.prefill_scan(c.projected[0], segments, tail, ssm, c.weights, chunk=32)
    close(cpu.prefill_scan(c.projected[0], segments, c.tail, c.ssm, c.weights, chunk=32), expected)
    assert torch.equal(c.tail, tail)
    close(c.ssm, ssm)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("lengths", [(1, 1), (64, 3, 65, 1), (200, 2, 7, 129, 16)])
def test_prompts_together_have_the_bits_of_each_alone(lengths: tuple[int, ...], pooled: bool, threads: int) -> None:
    c, segments = case(6, sum(lengths)), Segments(lengths, CPU)
    rows = [5, 0, 3, 4, 1][: len(lengths)] if pooled else list(range(len(lengths)))
    tail, ssm, projected = c.tail[rows].clone(), c.ssm[rows].clone(), c.projected[0]
    mine, slots = ((c.tail, c.ssm), torch.tensor(rows)) if pooled else ((c.tail[: len(rows)], c.ssm[: len(rows)]), None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out = cpu.prefill_scan(projected, segments, *mine, c.weights, chunk=32, slots=slots)
    torch.set_num_threads(before)
    for i, (row, (start, end)) in enumerate(zip(rows, segments.spans, strict=True)):
        one = (tail[i : i + 1], ssm[i : i + 1])
        alone = cpu.prefill_scan(projected[start:end].clone(), Segments([end - start], CPU), *one, c.weights, chunk=32)
        assert torch.equal(out[start:end], alone)
        assert torch.equal(c.tail[row], one[0][0])
        assert torch.equal(c.ssm[row], one[1][0])


@pytest.mark.parametrize("kernel", [1, 2, 4, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_convolutions(kernel: int, bias: bool, dtype: torch.dtype) -> None:
    c = case(2, 3, kernel=kernel, bias=bias, weight_dtype=dtype)
    close(cpu.block_scan(c.projected, c.tail, c.ssm, c.weights), plain.block_scan(c.projected, c.tail, c.ssm, c.weights))


def test_limits_of_dt_and_large_dt() -> None:
    c = case(1, 16)
    c.projected[:, 3, -HEADS:] = 300.0
    for limit in ((0.0, math.inf), (0.5, 0.75)):
        weights = replace(c.weights, time_step_limit=limit)
        close(cpu.block_scan(c.projected, c.tail, c.ssm, weights), plain.block_scan(c.projected, c.tail, c.ssm, weights))


def test_slots_of_a_pool_and_rows_that_do_not_depend_on_one_another() -> None:
    c, slots = case(5, 16), torch.tensor([3, 0, 4])
    block = c.projected[:3]
    out = cpu.block_scan(block, c.tail, c.ssm, c.weights, slots=slots)
    own = [cpu.block_scan(block[i : i + 1], c.tail[s : s + 1], c.ssm[s : s + 1], c.weights) for i, s in enumerate([3, 0, 4])]
    assert torch.equal(out, torch.cat(own))
    tail, ssm = c.tail.clone(), c.ssm.clone()
    _, factors = cpu.block_scan_commit(block, tail, ssm, c.weights, slots=slots)
    for row, slot in enumerate([3, 0, 4]):
        state = c.ssm[slot].clone()
        apply_factors_(state, factors.x[row], factors.b[row], factors.dt[row], c.weights.a)
        assert torch.equal(ssm[slot], state)
        assert torch.equal(tail[slot], factors.conv[row])
    assert torch.equal(ssm[[1, 2]], c.ssm[[1, 2]])
    assert torch.equal(tail[[1, 2]], c.tail[[1, 2]])


def test_what_is_not_finite_stays_in_its_row() -> None:
    c = case(2, 4)
    sound = cpu.block_scan(c.projected, c.tail, c.ssm, c.weights)
    c.projected[1, 2, 0] = math.nan
    out = cpu.block_scan(c.projected, c.tail, c.ssm, c.weights)
    assert torch.equal(out[0], sound[0])
    assert out[1, 2].isnan().any()


def test_what_does_not_fit_takes_the_plain_way() -> None:
    long = case(1, 65)
    assert torch.equal(
        cpu.block_scan(long.projected, long.tail, long.ssm, long.weights),
        plain.block_scan(long.projected, long.tail, long.ssm, long.weights),
    )
    wide = case(1, 4)
    arguments = (wide.projected.float(), wide.tail.float(), wide.ssm, wide.weights)
    assert torch.equal(cpu.block_scan(*arguments), plain.block_scan(*arguments))


@pytest.mark.parametrize(("heads", "head_dim", "groups", "n"), [(4, 32, 2, 48), (2, 4, 1, 5), (3, 8, 3, 33), (2, 64, 1, 128)])
@pytest.mark.parametrize("length", [1, 7, 16])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_deltas_have_the_bits_of_the_plain_form(
    heads: int, head_dim: int, groups: int, n: int, length: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(n)
    state = scale * torch.randn(3, heads, head_dim, n, generator=g)
    x = torch.randn(3, length, heads, head_dim, generator=g).bfloat16()
    b = torch.randn(3, length, groups, n, generator=g).bfloat16()
    dt = torch.rand(3, length, heads, generator=g) * 2
    a = -torch.rand(heads, generator=g) * 3
    ours = [state.clone() for _ in range(3)]
    slots = torch.tensor([2, 0])
    apply_factors_(ours[0], x, b, dt, a)
    apply_factors_(ours[1][1], x[1], b[1], dt[1], a)
    apply_factors_(ours[2], x[:2], b[:2], dt[:2], a, slots=slots)
    monkeypatch.setattr(cpu_factors, "library_for_factors", lambda *tensors: None)
    theirs = [state.clone() for _ in range(3)]
    apply_factors_(theirs[0], x, b, dt, a)
    apply_factors_(theirs[1][1], x[1], b[1], dt[1], a)
    apply_factors_(theirs[2], x[:2], b[:2], dt[:2], a, slots=slots)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
