"""A commit's delta applied to the state, as a Triton kernel: the same bits as `twotower_kernels.scan.apply_factors`."""

# Kernels are Triton's language, not Python: no types but tl.constexpr, whose names are written as constants.
# ruff: noqa: N803
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

UNROLL = 4
"""Positions whose factors are loaded at once, so that the loads do not wait for the state."""


def apply_factors(
    state: Tensor,
    x: Tensor,
    b: Tensor,
    dt: Tensor,
    a: Tensor,
    *,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The state after L positions, from the factors of their updates: the bits of the torch function of that name.

    Either state (h, p, n) fp32, x (L, h, p), b (L, g, n), dt (L, h) fp32, or all of them with a batch axis in
    front; a (h,) fp32. Returns the new state: `out` if given, which may be `state` itself, else a new tensor.
    With `slots` (B,) int64, distinct, `state` is a pool (slots, h, p, n) whose rows at slots change in place.
    With `counts` (B,) int64, each 0 to L, only the first counts[i] positions of row i are applied.

    What makes the bits equal: per position, torch rounds S * decay (`mul_`), and then adds dtx * b with one
    rounding, a fused multiply-add (`addcmul_` with value 1: std::fma on CUDA, vector FMA on a CPU that has it).
    So does the kernel: an explicit fma, whose addend the compiler cannot fuse a second time; dt * x is rounded on its own.
    Each of these is fixed by IEEE 754 and thus the same on every device. exp is not: the decays are therefore
    torch's own exp, outside of the kernel, since Triton's is another (ex2.approx on CUDA). Two CUDA ends agree,
    with this kernel or the torch function, as long as their torch builds share one expf; a CPU and a CUDA end
    can differ in a decay's last bit, whichever of the two functions they call. Denormals are kept everywhere.
    """
    batched = state.dim() == 4
    if not batched:
        assert slots is None
        assert counts is None
        new = apply_factors(state[None], x[None], b[None], dt[None], a, out=None if out is None else out[None])
        return new[0]
    batch, length, heads, head_dim = x.shape
    groups, n = b.shape[-2:]
    assert state.shape[1:] == (heads, head_dim, n)
    assert b.shape[:2] == (batch, length)
    assert dt.shape == (batch, length, heads)
    assert a.shape == (heads,)
    assert state.dtype == dt.dtype == a.dtype == torch.float32
    assert state.is_contiguous()
    assert counts is None or counts.shape == (batch,)
    if slots is not None:
        assert out is None
        assert slots.shape == (batch,)
        out = state
    else:
        assert state.shape[0] == batch
        out = torch.empty_like(state) if out is None else out
        assert out.shape == state.shape
        assert out.is_contiguous()
    if batch == 0:
        return out
    block_n = triton.next_power_of_2(n)
    block_p, warps = program(head_dim, block_n)
    _apply_kernel[(triton.cdiv(head_dim, block_p), heads, batch)](
        state,
        out,
        slots,
        counts,
        x.contiguous(),
        b.contiguous(),
        dt.contiguous(),
        (dt * a).exp().contiguous(),
        length,
        HEADS=heads,
        HEAD_DIM=head_dim,
        GROUPS=groups,
        STATE=n,
        HAS_SLOTS=slots is not None,
        HAS_COUNTS=counts is not None,
        BLOCK_P=block_p,
        BLOCK_N=block_n,
        UNROLL=UNROLL,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return out


def program(head_dim: int, block_n: int) -> tuple[int, int]:
    """The rows of a head's state that a program holds in registers (16 KiB), and its number of warps."""
    return min(triton.next_power_of_2(head_dim), max(1, 4096 // block_n)), 4


@triton.jit
def advance(
    s,
    x,
    b,
    dt,
    decay,
    first,
    length,
    head,
    group,
    p,
    n,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Returns rows p of a head's state, s (BLOCK_P, BLOCK_N) fp32, after `length` positions from `first` on."""
    for i in tl.range(0, length, loop_unroll_factor=UNROLL):
        at = first + i
        per_head = at * HEADS + head
        dtx = tl.load(dt + per_head) * tl.load(x + per_head * HEAD_DIM + p, mask=p < HEAD_DIM, other=0.0).to(tl.float32)
        row_b = tl.load(b + (at * GROUPS + group) * STATE + n, mask=n < STATE, other=0.0).to(tl.float32)
        s = s * tl.load(decay + per_head)
        s = tl.fma(tl.broadcast_to(dtx[:, None], (BLOCK_P, BLOCK_N)), tl.broadcast_to(row_b[None, :], (BLOCK_P, BLOCK_N)), s)
    return s


@triton.jit
def _apply_kernel(
    state,
    out,
    slots,
    counts,
    x,
    b,
    dt,
    decay,
    length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    STATE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: BLOCK_P rows of one head's state, in registers over all positions. Read before it is written."""
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = row
    if HAS_SLOTS:
        slot = tl.load(slots + row).to(tl.int64)
    p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    known = (p < HEAD_DIM)[:, None] & (n < STATE)[None, :]
    offset = ((slot * HEADS + head) * HEAD_DIM + p[:, None]) * STATE + n[None, :]
    s = tl.load(state + offset, mask=known, other=0.0, eviction_policy="evict_first")
    group = head // (HEADS // GROUPS)
    last = length
    if HAS_COUNTS:
        last = tl.load(counts + row).to(tl.int32)
    at = row * length
    s = advance(s, x, b, dt, decay, at, last, head, group, p, n, HEADS, HEAD_DIM, GROUPS, STATE, BLOCK_P, BLOCK_N, UNROLL)
    tl.store(out + offset, s, mask=known)
