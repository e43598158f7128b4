"""Mamba-2 over a block, and over prompts, on a CPU in bf16 (`mamba.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from twotower_kernels import block as plain
from twotower_kernels.block import ScanFactors, ScanWeights, empty_factors, take
from twotower_kernels.cpu.build import address, check, library_for
from twotower_kernels.prefill import Segments
from twotower_kernels.prefill import prefill_scan as plain_prefill_scan

MAX_BLOCK = 64
MAX_KERNEL = 8
LANES = 16
"""A head's size and its state's must be multiples of it."""


def block_scan(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> Tensor:
    """As `twotower_kernels.block.block_scan`."""
    library = _block_library_for(projected, conv_tail, ssm, weights)
    if library is None:
        return plain.block_scan(projected, conv_tail, ssm, weights, slots=slots)
    return _run(library, projected, conv_tail, ssm, weights, slots, None)


def block_scan_factors(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> tuple[Tensor, ScanFactors]:
    """As `twotower_kernels.block.block_scan_factors`, position by position.

    So a token's bits, and those of the state behind it, do not depend on the block that it was read in: a
    verified draft has the bits of AR's steps.
    """
    library = _block_library_for(projected, conv_tail, ssm, weights)
    if library is None:
        return plain.block_scan_factors(projected, conv_tail, ssm, weights, slots=slots)
    factors = empty_factors(projected, conv_tail, ssm, weights.groups)
    library.tt_time_steps(
        *(projected.data_ptr(), projected.stride(0), projected.stride(1), weights.dt_bias.data_ptr()),
        *(*weights.time_step_limit, factors.dt.data_ptr(), *projected.shape, weights.dt_bias.shape[0]),
    )
    return _run(library, projected, conv_tail, ssm, weights, slots, factors), factors


def block_scan_commit(
    projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights, *, slots: Tensor | None = None
) -> tuple[Tensor, ScanFactors]:
    """As `twotower_kernels.block.block_scan_commit`."""
    if _block_library_for(projected, conv_tail, ssm, weights) is None:
        return plain.block_scan_commit(projected, conv_tail, ssm, weights, slots=slots)
    out, factors = block_scan_factors(projected, conv_tail, ssm, weights, slots=slots)
    take(conv_tail, ssm, factors, weights.a, slots)
    return out, factors


def prefill_scan(
    projected: Tensor,
    segments: Segments,
    conv_tail: Tensor,
    ssm: Tensor,
    weights: ScanWeights,
    *,
    chunk: int,
    slots: Tensor | None = None,
) -> Tensor:
    """As `twotower_kernels.prefill.prefill_scan`, in pieces of `MAX_BLOCK` positions.

    A chunk has the bits that it has alone.
    """
    library = _library_for(projected, conv_tail, ssm, weights)
    if library is None:
        return plain_prefill_scan(projected, segments, conv_tail, ssm, weights, chunk=chunk, slots=slots)
    assert projected.shape[0] == segments.total
    assert slots is None or (slots.dtype == torch.int64 and slots.is_contiguous() and slots.shape == (len(segments),))
    _, heads, head_dim, n = ssm.shape
    out = projected.new_empty(segments.total, heads * head_dim)
    failed = library.tt_prefill_scan(
        *(projected.data_ptr(), projected.stride(0), segments.borders.data_ptr()),
        *(conv_tail.data_ptr(), ssm.data_ptr(), address(slots)),
        *_addresses(weights),
        out.data_ptr(),
        *(len(segments), heads, head_dim, weights.groups, n, weights.conv_weight.shape[-1], torch.get_num_threads()),
    )
    check(failed, f"the scan of {segments.total} tokens")
    return out


def _library_for(projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights) -> ctypes.CDLL | None:
    conv_weight, conv_bias = weights.conv_weight, weights.conv_bias
    fits = (
        projected.dtype == conv_tail.dtype == torch.bfloat16
        and conv_weight.shape[-1] <= MAX_KERNEL
        and ssm.shape[-1] % LANES == ssm.shape[-2] % LANES == 0
        and projected.stride(-1) == 1
        and conv_tail.is_contiguous()
        and ssm.is_contiguous()
        and conv_weight.is_contiguous()
        and conv_weight.dtype in (torch.bfloat16, torch.float32)
        and (conv_bias is None or conv_bias.dtype == conv_weight.dtype)
    )
    return library_for(projected, conv_tail, ssm, conv_weight, weights.norm) if fits else None


def _block_library_for(projected: Tensor, conv_tail: Tensor, ssm: Tensor, weights: ScanWeights) -> ctypes.CDLL | None:
    return _library_for(projected, conv_tail, ssm, weights) if 1 <= projected.shape[1] <= MAX_BLOCK else None


def _addresses(weights: ScanWeights) -> tuple[float | int | None, ...]:
    """A layer's weights as the kernels take them."""
    return (
        weights.conv_weight.data_ptr(),
        address(weights.conv_bias),
        weights.conv_weight.dtype == torch.bfloat16,
        weights.dt_bias.data_ptr(),
        weights.a.data_ptr(),
        weights.d.data_ptr(),
        weights.norm.data_ptr(),
        weights.eps,
        *weights.time_step_limit,
    )


def _run(
    library: ctypes.CDLL,
    projected: Tensor,
    conv_tail: Tensor,
    ssm: Tensor,
    weights: ScanWeights,
    slots: Tensor | None,
    factors: ScanFactors | None,
) -> Tensor:
    """`factors`, contiguous and with their dt, are filled if given."""
    batch, length, _ = projected.shape
    _, heads, head_dim, n = ssm.shape
    assert slots is None or (slots.dtype == torch.int64 and slots.is_contiguous() and slots.shape == (batch,))
    out = projected.new_empty(batch, length, heads * head_dim)
    decay = None if factors is None else (factors.dt * weights.a).exp()  # to the bits of `apply_factors_`
    failed = library.tt_block_scan(
        projected.data_ptr(),
        projected.stride(0),
        projected.stride(1),
        conv_tail.data_ptr(),
        ssm.data_ptr(),
        address(slots),
        *_addresses(weights),
        out.data_ptr(),
        *((None,) * 5 if factors is None else map(address, (factors.x, factors.b, factors.dt, decay, factors.conv))),
        batch,
        length,
        heads,
        head_dim,
        weights.groups,
        n,
        weights.conv_weight.shape[-1],
        torch.get_num_threads(),
    )
    check(failed, f"the scan of {batch} blocks")
    return out
