"""The first positions of a block alone: S from its factors, the conv tail from its raw columns; plain and in C++."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from twotower_kernels import block as plain
from twotower_kernels.block import ScanWeights, tails_after
from twotower_kernels.cpu import factors as cpu_factors
from twotower_kernels.cpu import mamba as cpu
from twotower_kernels.scan import apply_factors_

HEADS, HEAD_DIM, GROUPS, STATE, KERNEL = 4, 16, 2, 16, 4
CHANNELS = HEADS * HEAD_DIM + 2 * GROUPS * STATE


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _weights(dtype: torch.dtype) -> ScanWeights:
    return ScanWeights(
        conv_weight=_draw(CHANNELS, 1, KERNEL).to(dtype),
        conv_bias=_draw(CHANNELS).to(dtype),
        dt_bias=_draw(HEADS),
        a=-_draw(HEADS).exp(),
        d=_draw(HEADS + 1)[1:],
        norm=_draw(HEADS * HEAD_DIM),
        groups=GROUPS,
        eps=1e-5,
        time_step_limit=(0.0, math.inf),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_each_row_takes_its_own_count(pooled: bool, library: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library:
        monkeypatch.setattr(cpu_factors, "library_for_factors", lambda *tensors: None)
    counts, length = torch.tensor([0, 1, 2, 5, 16]), 16
    x, b = _draw(5, length, HEADS, HEAD_DIM).to(dtype), _draw(5, length, GROUPS, STATE).to(dtype)
    dt, a = _draw(5, length, HEADS).abs(), -_draw(HEADS).abs()
    slots = torch.tensor([6, 0, 3, 1, 4]) if pooled else torch.arange(5)
    state = _draw(7 if pooled else 5, HEADS, HEAD_DIM, STATE)
    state[:, 0, 0] = -0.0  # an update by nothing would lose the sign
    before = state.clone()
    apply_factors_(state, x, b, dt, a, slots=slots if pooled else None, counts=counts)
    for row, (slot, count) in enumerate(zip(slots.tolist(), counts.tolist(), strict=True)):
        expected = before[slot].clone()
        apply_factors_(expected, x[row, :count], b[row, :count], dt[row, :count], a)
        assert torch.equal(state[slot].view(torch.int32), expected.view(torch.int32))
    others = [slot for slot in range(state.shape[0]) if slot not in slots.tolist()]
    assert torch.equal(state[others], before[others])


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 16])
def test_tails(length: int, kernel: int) -> None:
    tail, columns = _draw(length + 1, 6, kernel), _draw(length + 1, length, 6)
    counts = torch.arange(length + 1)
    tails = tails_after(tail, columns, counts)
    for row in range(length + 1):
        whole = torch.cat([tail[row], columns[row, :row].t()], 1)
        assert torch.equal(tails[row], whole[:, -kernel:])


@pytest.mark.parametrize("length", [1, 3, 16])
@pytest.mark.parametrize(("form", "dtype"), [(plain, torch.float32), (plain, torch.bfloat16), (cpu, torch.bfloat16)])
@pytest.mark.parametrize("pooled", [True, False])
def test_factors_without_the_commit_are_those_of_the_commit(
    pooled: bool, form: ModuleType, dtype: torch.dtype, length: int
) -> None:
    weights = _weights(dtype)
    projected = _draw(3, length, HEADS * HEAD_DIM + CHANNELS + HEADS).to(dtype)
    slots = torch.tensor([4, 0, 2]) if pooled else None
    tail, ssm = _draw(5 if pooled else 3, CHANNELS, KERNEL).to(dtype), _draw(5 if pooled else 3, HEADS, HEAD_DIM, STATE)
    before = tail.clone(), ssm.clone()
    out, factors = form.block_scan_factors(projected, tail, ssm, weights, slots=slots)
    assert torch.equal(tail, before[0])
    assert torch.equal(ssm, before[1])
    expected, committed = form.block_scan_commit(projected, tail, ssm, weights, slots=slots)
    assert torch.equal(out, expected)
    for name in ("x", "b", "dt", "conv"):
        assert torch.equal(getattr(factors, name), getattr(committed, name))
    mine = before[0] if slots is None else before[0][slots]
    columns = projected[..., HEADS * HEAD_DIM : HEADS * HEAD_DIM + CHANNELS]
    assert torch.equal(tails_after(mine, columns, torch.full((3,), length)), factors.conv)
