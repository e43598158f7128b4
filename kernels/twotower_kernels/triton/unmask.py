"""Confidence unmasking in two launches, as Triton kernels, without any exchange with the host.

The first reads the logits of masked positions once, split over the vocabulary, and writes a few numbers for each
chunk. The second, one program for each row of the batch, combines them, draws where the row's temperature is above 0,
ranks the positions and writes the block. Rows at temperature 0 pay nothing for rows that draw.
"""

# Kernels are Triton's language, not Python: no types but tl.constexpr, whose names are written as constants.
# ruff: noqa: N803
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels import unmask as plain
from twotower_kernels.unmask import Predict, Unmasked

MAX_BLOCK = 64
"""The most positions a block may have: all pairs of positions are held in registers."""

_MAX_CHUNKS = 64
"""The most chunks of the vocabulary: the second launch holds their numbers for all positions in registers."""

_MIN_CHUNK = 1024
"""The fewest logits that a program of the first launch reads; those of a drawn token's chunk are read a second time."""


def unmask(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    *,
    mask_id: int,
    gamma: Tensor,
    steps_left: Tensor,
    temperature: Tensor,
    uniforms: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    predict: Predict = plain.predict,
    chunk: int | None = None,
) -> Unmasked:
    """As `twotower_kernels.unmask.unmask`, in two launches; logits are only read.

    logits (B, L, V) fp32, contiguous in V, L <= 64; tokens (B, L) int64; masked (B, L) bool; gamma, temperature (B,)
    fp32; steps_left (B,) int64; uniforms (B, L) fp64. `chunk`, a power of two, overrides how much of the
    vocabulary a program reads.

    Draws invert the same cumulative distribution in fp64, but add it up chunk by chunk: a token can differ from
    torch's where the uniform lies within some 1e-15 of a border between two tokens, as between torch's own devices.
    A row that draws and meets an infinite logit fails, as a greedy one does; the torch form lets that pass.
    Where rows ask for top_k and top_p, the batch goes to the torch form, which sorts the vocabulary (and waits for
    the device). The caller passes them only if a row asks for them, so that this takes no question to the device.
    """
    batch, length, vocab = logits.shape
    assert tokens.shape == masked.shape == uniforms.shape == (batch, length)
    assert gamma.shape == steps_left.shape == temperature.shape == (batch,)
    if top_k is not None and top_p is not None:
        return plain.unmask(
            logits,
            tokens,
            masked,
            mask_id=mask_id,
            gamma=gamma,
            steps_left=steps_left,
            temperature=temperature,
            uniforms=uniforms,
            top_k=top_k,
            top_p=top_p,
            predict=predict,
        )
    assert 1 <= length <= MAX_BLOCK
    assert logits.dtype == torch.float32
    assert uniforms.dtype == torch.float64
    assert masked.dtype == torch.bool
    assert logits.stride(2) == 1
    if chunk is None:
        chunk = max(_MIN_CHUNK, triton.next_power_of_2(triton.cdiv(vocab, _MAX_CHUNKS)))
    chunks = triton.cdiv(vocab, chunk)
    new = Unmasked(
        torch.empty(batch, length, dtype=torch.int64, device=logits.device),
        torch.empty(batch, length, dtype=torch.bool, device=logits.device),
        torch.empty(batch, dtype=torch.bool, device=logits.device),
    )
    if batch == 0:
        return new
    tokens, masked, uniforms = tokens.contiguous(), masked.contiguous(), uniforms.contiguous()
    gamma, steps_left, temperature = gamma.contiguous(), steps_left.contiguous(), temperature.contiguous()
    shape = (batch, length, chunks)
    top, total = torch.empty((2, *shape), dtype=torch.float32, device=logits.device).unbind(0)
    best = torch.empty(shape, dtype=torch.int32, device=logits.device)
    mass = torch.empty(shape, dtype=torch.float64, device=logits.device)
    _scan_kernel[(chunks, length, batch)](
        logits,
        masked,
        temperature,
        top,
        best,
        total,
        mass,
        mask_id,
        vocab,
        *logits.stride()[:2],
        CHUNK=chunk,
        num_warps=4,
        enable_fp_fusion=True,
    )
    _commit_kernel[(batch,)](
        logits,
        tokens,
        masked,
        gamma,
        steps_left,
        temperature,
        uniforms,
        top,
        best,
        total,
        mass,
        new.tokens,
        new.masked,
        new.finite,
        mask_id,
        length,
        vocab,
        chunks,
        *logits.stride()[:2],
        CHUNK=chunk,
        BLOCK_L=triton.next_power_of_2(length),
        BLOCK_C=triton.next_power_of_2(chunks),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return new


@triton.jit
def _read(logits, at, mask_id, vocab):
    """Logits of one position at vocabulary indices `at`, -inf for the mask id and beyond the end."""
    # The mask id is excluded only after loading, so that the load stays one of 16 bytes a thread.
    return tl.where(at == mask_id, -float("inf"), tl.load(logits + at, mask=at < vocab, other=-float("inf")))


@triton.jit
def _base(top):
    """The number to subtract before exp: the maximum, or 0 where that is infinite, as in torch.logsumexp."""
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def _scan_kernel(
    logits,
    masked,
    temperature,
    tops,
    bests,
    totals,
    masses,
    mask_id,
    vocab,
    logits_row,
    logits_position,
    CHUNK: tl.constexpr,
):
    """One program: one chunk of the vocabulary at one masked position.

    Writes the largest logit (infinite for NaN), the first index that has it, the sum of exp(logit - largest), which
    keeps NaN, and for rows that draw the sum of exp((logit - largest) / temperature) in fp64.
    """
    chunk, position, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    flat = row * tl.num_programs(1) + position
    if tl.load(masked + flat) != 0:
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = _read(logits + row * logits_row + position * logits_position, at, mask_id, vocab)
        ordered = tl.where(x == x, x, float("inf"))
        top = tl.max(ordered, 0)
        to = flat * tl.num_programs(0) + chunk
        tl.store(tops + to, top)
        tl.store(bests + to, tl.min(tl.where(ordered == top, at, vocab), 0))
        tl.store(totals + to, tl.sum(tl.exp(x - _base(top)), 0))
        heat = tl.load(temperature + row).to(tl.float64)
        if heat > 0:
            scaled = x.to(tl.float64) / heat - _base(top).to(tl.float64) / heat
            tl.store(masses + to, tl.sum(tl.exp(scaled), 0))


@triton.jit
def _commit_kernel(
    logits,
    tokens,
    masked,
    gamma,
    steps_left,
    temperature,
    uniforms,
    tops,
    bests,
    totals,
    masses,
    new_tokens,
    new_masked,
    finite,
    mask_id,
    length,
    vocab,
    chunks,
    logits_row,
    logits_position,
    CHUNK: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: one row of the batch."""
    row = tl.program_id(0).to(tl.int64)
    position, c = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_C)
    flat = row * length + position
    was = tl.load(masked + flat, mask=position < length, other=0) != 0
    # Chunks of positions that are not masked were never written, and those of -inf alone have no weight.
    to = flat[:, None] * chunks + c[None, :]
    written = was[:, None] & (c < chunks)[None, :]
    top = tl.load(tops + to, mask=written, other=-float("inf"))
    largest = tl.max(top, 1)
    best = tl.load(bests + to, mask=written & (top == largest[:, None]), other=vocab)
    predicted = tl.minimum(tl.min(best, 1), vocab - 1)
    # This is torch's formula, so that confidences that round to equal there do so here: (x - (log sum + max)).exp().
    base = _base(largest)
    shift = tl.where(top == -float("inf"), 0.0, _base(top) - base[:, None])
    total = tl.sum(tl.load(totals + to, mask=written, other=0.0) * tl.exp(shift), 1)
    evidence = tl.log(tl.where(was, total, 1.0)) + base
    logit = largest

    heat = tl.load(temperature + row).to(tl.float64)
    if heat > 0:
        for i in range(0, length):
            if tl.load(masked + row * length + i) != 0:
                here = (row * length + i) * chunks + c
                tops_here = tl.load(tops + here, mask=c < chunks, other=-float("inf"))
                peak = _base(tl.max(tops_here, 0)).to(tl.float64) / heat
                mass = tl.load(masses + here, mask=c < chunks, other=0.0)
                lower = tl.where(tops_here == -float("inf"), 0.0, _base(tops_here).to(tl.float64) / heat - peak)
                mass = mass * tl.exp(lower)
                reached = tl.cumsum(mass, 0)
                target = tl.load(uniforms + row * length + i) * tl.sum(mass, 0)
                # The first chunk that passes the target, and if rounding let none do so, the last with any mass.
                chosen = tl.min(tl.where(reached > target, c, BLOCK_C), 0)
                last = tl.max(tl.where(mass > 0, c, 0), 0)
                chosen = tl.minimum(chosen, last)
                reached_before = tl.sum(tl.where(c < chosen, mass, 0.0), 0)
                at = chosen * CHUNK + tl.arange(0, CHUNK)
                x = _read(logits + row * logits_row + i * logits_position, at, mask_id, vocab)
                p = tl.exp(x.to(tl.float64) / heat - peak)
                first = tl.min(tl.where(reached_before + tl.cumsum(p, 0) > target, at, vocab), 0)
                drawn = tl.minimum(first, tl.max(tl.where(p > 0, at, 0), 0))
                predicted = tl.where(position == i, drawn, predicted)
                its_logit = tl.max(tl.where(at == drawn, x, -float("inf")), 0)
                logit = tl.where(position == i, its_logit, logit)

    confidence = tl.exp(logit - evidence)
    # An infinite logit makes a draw arbitrary, and its confidence 0, which would look sound.
    sound = (confidence == confidence) & (tl.abs(evidence) != float("inf"))
    tl.store(finite + row, tl.min((sound | ~was).to(tl.int32), 0) != 0)
    left = tl.sum(was.to(tl.int64), 0)
    sure = tl.sum((was & (confidence.to(tl.float64) > tl.load(gamma + row).to(tl.float64))).to(tl.int64), 0)
    steps = tl.load(steps_left + row)
    due = (left + steps - 1) // steps
    count = tl.minimum(tl.maximum(tl.maximum(sure, due), 1), left)
    # Rank among the masked, the most confident first and of equals those further back; NaN is the greatest, as in torch.
    key = tl.where(sound, confidence, float("inf"))
    key = tl.where(was, key, -1.0)
    ahead = (key[None, :] > key[:, None]) | ((key[None, :] == key[:, None]) & (position[None, :] > position[:, None]))
    rank = tl.sum((ahead & was[None, :]).to(tl.int64), 1)
    commit = was & (rank < count)
    before = tl.load(tokens + flat, mask=position < length, other=0)
    tl.store(new_tokens + flat, tl.where(commit, predicted.to(tl.int64), before), mask=position < length)
    tl.store(new_masked + flat, was & ~commit, mask=position < length)
