"""The block scan and the delta kernels against the torch layer and the torch function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels import scan as plain
from twotower_kernels.conv import causal_conv

pytest.importorskip("triton")

from twotower_kernels.block import ScanFactors, ScanWeights
from twotower_kernels.triton.common import interpreted
from twotower_kernels.triton.factors import apply_factors
from twotower_kernels.triton.scan import block_scan, block_scan_commit

pytestmark = pytest.mark.device

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = [torch.float32, torch.bfloat16]


@dataclass(frozen=True)
class Sizes:
    """Of a Mamba layer."""

    heads: int
    head_dim: int
    groups: int
    n: int
    kernel: int = 4

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim + 2 * self.groups * self.n


SMALL = Sizes(heads=2, head_dim=16, groups=1, n=16)
ODD = Sizes(heads=4, head_dim=6, groups=2, n=5, kernel=3)
LARGE = Sizes(heads=2, head_dim=64, groups=1, n=128)


@dataclass(frozen=True)
class Case:
    """Inputs of one layer for one batch of blocks."""

    projected: Tensor
    conv_tail: Tensor
    ssm: Tensor
    weights: ScanWeights


def _case(
    sizes: Sizes,
    batch: int,
    length: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    limit: tuple[float, float] = (0.0, math.inf),
    dt_shift: float = 0.0,
    rate: float = 1.0,
    seed_scale: float = 1.0,
) -> Case:
    g = torch.Generator().manual_seed(length)
    d_inner = sizes.heads * sizes.head_dim

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g).to(DEVICE, dtype)

    weights = ScanWeights(
        conv_weight=draw(sizes.channels, 1, sizes.kernel, dtype=dtype),
        conv_bias=draw(sizes.channels, dtype=dtype) if bias else None,
        dt_bias=draw(sizes.heads) + dt_shift,
        a=-(draw(sizes.heads).exp() * rate),
        d=draw(sizes.heads),
        norm=draw(d_inner),
        groups=sizes.groups,
        eps=1e-5,
        time_step_limit=limit,
    )
    return Case(
        projected=draw(batch, length, d_inner + sizes.channels + sizes.heads, dtype=dtype),
        conv_tail=draw(batch, sizes.channels, sizes.kernel, dtype=dtype),
        ssm=seed_scale * draw(batch, sizes.heads, sizes.head_dim, sizes.n),
        weights=weights,
    )


def _reference(case: Case) -> tuple[Tensor, ScanFactors, Tensor]:
    """The layer as the towers write it, but with the recurrence position by position, in fp64."""
    w = case.weights
    _, heads, head_dim, n = case.ssm.shape
    d_inner, bc = heads * head_dim, w.groups * n
    z, xbc, dt = case.projected.split([d_inner, d_inner + 2 * bc, heads], dim=-1)
    columns = torch.cat([case.conv_tail.transpose(1, 2), xbc], 1)
    mixed = F.silu(causal_conv(columns[:, 1:], w.conv_weight, w.conv_bias))
    x, b, c = mixed.split([d_inner, bc, bc], dim=-1)
    x = x.unflatten(-1, (heads, head_dim))
    b, c = (v.unflatten(-1, (w.groups, n)) for v in (b, c))
    dt = F.softplus(dt.float() + w.dt_bias).clamp(*w.time_step_limit)
    y, state = _recurrence(x, dt, w.a, b, c, case.ssm)
    y = y + w.d.double().unsqueeze(-1) * x.double()
    gated = (y.flatten(-2) * F.silu(z.double())).unflatten(-1, (w.groups, -1))
    normed = F.rms_norm(gated, gated.shape[-1:], None, w.eps).flatten(-2) * w.norm
    kernel = w.conv_weight.shape[-1]
    return normed, ScanFactors(x, b, dt, columns[:, -kernel:].transpose(1, 2)), state


def _recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    x, dt, a, b, c, state = (v.double() for v in (x, dt, a, b, c, state))
    b, c = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (b, c))
    ys = []
    for i in range(x.shape[1]):
        added = (dt[:, i, :, None] * x[:, i]).unsqueeze(-1) * b[:, i].unsqueeze(-2)
        state = state * (dt[:, i] * a).exp()[..., None, None] + added
        ys.append((state * c[:, i].unsqueeze(-2)).sum(-1))
    return torch.stack(ys, 1), state


def _close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest value."""
    assert got.isfinite().all()
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.double().abs().max().item(), error


def _check(case: Case) -> None:
    dtype = case.projected.dtype
    seed, tail = case.ssm.clone(), case.conv_tail.clone()
    out = block_scan(case.projected, case.conv_tail, case.ssm, case.weights)
    assert torch.equal(case.ssm, seed)
    assert torch.equal(case.conv_tail, tail)
    state, new_tail = seed.clone(), tail.clone()
    committed, factors = block_scan_commit(case.projected, new_tail, state, case.weights)
    assert torch.equal(new_tail, factors.conv)
    expected, expected_factors, expected_state = _reference(case)
    assert out.dtype is dtype
    _close(out, expected, 1e-4 if dtype is torch.float32 else 1e-2)
    _close(committed, out, 1e-5 if dtype is torch.float32 else 1e-2)
    # A rounding of x or b to bf16 may fall the other way; the state is then judged from the kernel's own factors.
    _close(factors.x, expected_factors.x, 1e-5 if dtype is torch.float32 else 1e-2)
    _close(factors.b, expected_factors.b, 1e-5 if dtype is torch.float32 else 1e-2)
    torch.testing.assert_close(factors.dt, expected_factors.dt, rtol=1e-5, atol=0)
    assert torch.equal(factors.conv, expected_factors.conv)
    _close(state, _recurrence(factors.x, factors.dt, case.weights.a, factors.b, factors.b, seed)[1], 1e-5)
    _close(state, expected_state, 1e-5 if dtype is torch.float32 else 1e-2)
    for row in range(state.shape[0]):
        f = factors
        assert torch.equal(state[row], plain.apply_factors(seed[row], f.x[row], f.b[row], f.dt[row], case.weights.a))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 3, 16, 17, 64])
def test_a_block_of_any_length(length: int, dtype: torch.dtype) -> None:
    _check(_case(SMALL, 2, length, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_that_are_no_powers_of_two(dtype: torch.dtype) -> None:
    _check(_case(ODD, 2, 5, dtype, bias=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_head_from_a_grown_state(dtype: torch.dtype) -> None:
    _check(_case(LARGE, 1, 16, dtype, seed_scale=1e3))


@pytest.mark.parametrize(
    ("dt_shift", "rate"),
    [
        pytest.param(-18.0, 1e-3, id="decays near 1"),
        pytest.param(-70.0, 1.0, id="dt that vanishes beside 1"),
        pytest.param(30.0, 10.0, id="decays of 0"),
        pytest.param(100.0, 1e-4, id="big dt that decays little"),
        pytest.param(1e4, 1.0, id="huge dt"),
    ],
)
def test_extreme_steps(dt_shift: float, rate: float) -> None:
    _check(_case(SMALL, 1, 16, torch.float32, dt_shift=dt_shift, rate=rate))


def test_a_small_decay_behind_a_large_one_keeps_its_digits() -> None:
    case = _case(SMALL, 1, 16, torch.float32, rate=1e-2)
    case.projected[:, 2, -SMALL.heads :] = 1e6
    _check(case)


def test_the_limits_of_dt() -> None:
    _check(_case(SMALL, 1, 16, torch.float32, limit=(0.5, 0.75)))


def test_nan_in_dt_is_not_hidden() -> None:
    case = _case(SMALL, 2, 4, torch.float32)
    case.projected[1, 2, -1] = math.nan
    out = block_scan(case.projected, case.conv_tail, case.ssm, case.weights)
    assert out[0].isfinite().all()
    assert out[1, 2].isnan().any()


def test_slots_of_pools() -> None:
    case = _case(ODD, 5, 4, torch.bfloat16)
    slots = torch.tensor([3, 0, 4], device=DEVICE)
    block = case.projected[:3]
    own_tail, own_ssm = case.conv_tail[slots], case.ssm[slots]
    gathered, own = block_scan_commit(block, own_tail, own_ssm, case.weights)
    assert torch.equal(block_scan(block, case.conv_tail, case.ssm, case.weights, slots=slots), gathered)
    ssm, tail = case.ssm.clone(), case.conv_tail.clone()
    out, factors = block_scan_commit(block, tail, ssm, case.weights, slots=slots)
    assert torch.equal(out, gathered)
    assert torch.equal(factors.conv, own.conv)
    assert torch.equal(ssm[slots], own_ssm)
    assert torch.equal(tail[slots], own_tail)
    others = torch.tensor([1, 2], device=DEVICE)
    assert torch.equal(ssm[others], case.ssm[others])
    assert torch.equal(tail[others], case.conv_tail[others])


def test_a_batch_without_rows() -> None:
    case = _case(SMALL, 0, 16, torch.bfloat16)
    out, factors = block_scan_commit(case.projected, case.conv_tail, case.ssm, case.weights)
    assert out.shape == (0, 16, SMALL.heads * SMALL.head_dim)
    assert factors.x.shape[0] == 0


def test_a_row_does_not_depend_on_its_batch() -> None:
    case = _case(SMALL, 3, 16, torch.bfloat16)
    whole = block_scan(case.projected, case.conv_tail, case.ssm, case.weights)
    alone = block_scan(case.projected[1:2], case.conv_tail[1:2], case.ssm[1:2], case.weights)
    assert torch.equal(whole[1:2], alone)


def _factors(sizes: Sizes, length: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(length)
    x = torch.randn(length, sizes.heads, sizes.head_dim, generator=g).to(DEVICE, dtype)
    b = torch.randn(length, sizes.groups, sizes.n, generator=g).to(DEVICE, dtype)
    dt = F.softplus(torch.randn(length, sizes.heads, generator=g) * scale).to(DEVICE)
    a = -torch.rand(sizes.heads, generator=g).to(DEVICE)
    state = torch.randn(sizes.heads, sizes.head_dim, sizes.n, generator=g).to(DEVICE) * 1e3
    return state, x, b, dt, a


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SMALL, ODD, LARGE])
@pytest.mark.parametrize(("length", "scale"), [(1, 1.0), (16, 1.0), (64, 30.0)])
def test_a_delta_gives_the_bits_of_the_torch_function(sizes: Sizes, length: int, scale: float, dtype: torch.dtype) -> None:
    state, x, b, dt, a = _factors(sizes, length, dtype, scale)
    before = state.clone()
    expected = plain.apply_factors(state, x, b, dt, a)
    assert torch.equal(apply_factors(state, x, b, dt, a), expected)
    assert torch.equal(state, before)
    assert torch.equal(apply_factors(state, x, b, dt, a, out=state), expected)
    assert torch.equal(state, expected)


def test_a_delta_with_and_without_a_batch() -> None:
    rows = [_factors(ODD, 7, torch.bfloat16, scale) for scale in (1.0, 2.0, 3.0)]
    a = rows[0][-1]
    state, x, b, dt = (torch.stack([row[i] for row in rows]) for i in range(4))
    expected = torch.stack([plain.apply_factors(row[0], row[1], row[2], row[3], a) for row in rows])
    assert torch.equal(apply_factors(state, x, b, dt, a), expected)
    slots = torch.tensor([2, 0], device=DEVICE)
    pool = state.clone()
    assert apply_factors(pool, x[slots], b[slots], dt[slots], a, slots=slots) is pool
    assert torch.equal(pool, torch.stack([expected[0], state[1], expected[2]]))


def test_a_delta_of_denormals_and_of_nothing() -> None:
    state, x, b, dt, a = _factors(ODD, 4, torch.float32)
    tiny = state * 1e-43
    assert tiny.ne(0).any()
    x = x * 1e-40
    assert torch.equal(apply_factors(tiny, x, b, dt, a), plain.apply_factors(tiny, x, b, dt, a))
    assert torch.equal(apply_factors(state, x[:0], b[:0], dt[:0], a), state)
