"""Chunks of several prompts in one forward, in plain torch: each as by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twotower_kernels import attention
from twotower_kernels.block import ScanWeights, block_scan_commit
from twotower_kernels.prefill import Segments, prefill_scan, prompt_attention

CPU = torch.device("cpu")
HEADS, HEAD_DIM, GROUPS, STATE, KERNEL = 4, 6, 2, 5, 4
CHANNELS = HEADS * HEAD_DIM + 2 * GROUPS * STATE


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _weights() -> ScanWeights:
    return ScanWeights(
        conv_weight=_draw(CHANNELS, 1, KERNEL),
        conv_bias=_draw(CHANNELS),
        dt_bias=_draw(HEADS),
        a=-_draw(HEADS).exp(),
        d=_draw(HEADS + 1)[1:],
        norm=_draw(HEADS * HEAD_DIM),
        groups=GROUPS,
        eps=1e-5,
        time_step_limit=(0.0, math.inf),
    )


def test_whose_positions_are_whose() -> None:
    segments = Segments([3, 1, 5], CPU)
    assert (len(segments), segments.total) == (3, 9)
    assert segments.spans == [(0, 3), (3, 4), (4, 9)]
    assert segments.borders.tolist() == [0, 3, 4, 9]
    rows, places = segments.numbers
    assert rows.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert places.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert segments.tiles(2).tolist() == [[0, 0], [0, 2], [1, 0], [2, 0], [2, 2], [2, 4]]
    assert segments.tiles(8).tolist() == [[0, 0], [1, 0], [2, 0]]


@pytest.mark.parametrize("pooled", [False, True])
def test_a_scan_is_the_commits_of_its_positions(pooled: bool) -> None:
    lengths, weights = (7, 1, 2, 40), _weights()
    segments = Segments(lengths, CPU)
    projected = _draw(segments.total, HEADS * HEAD_DIM + CHANNELS + HEADS)
    tails, ssm = _draw(6, CHANNELS, KERNEL), _draw(6, HEADS, HEAD_DIM, STATE)
    slots = torch.tensor([4, 0, 5, 2]) if pooled else torch.arange(4)
    before, seeds = tails.clone(), ssm.clone()
    mine = (tails, ssm) if pooled else (tails[:4], ssm[:4])
    out = prefill_scan(projected, segments, *mine, weights, chunk=16, slots=slots if pooled else None)
    for slot, (start, end) in zip(slots.tolist(), segments.spans, strict=True):
        tail, state = before[slot : slot + 1], seeds[slot : slot + 1]
        expected, _ = block_scan_commit(projected[start:end].unsqueeze(0), tail, state, weights)
        torch.testing.assert_close(out[start:end], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ssm[slot], state[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(tails, before)  # those of the slots moved on with them
    others = [slot for slot in range(6) if slot not in slots.tolist()]
    assert torch.equal(ssm[others], seeds[others])


def test_attention_over_pages() -> None:
    lengths, contexts, page = (5, 1, 33), (0, 70, 15), 16
    segments, table = Segments(lengths, CPU), torch.full((3, 6), 1 << 30, dtype=torch.int32)
    k_pages, v_pages = torch.full((2, 12, 2, page, 8), math.nan).unbind(0)
    q, used, expected = _draw(4, segments.total, 8), 0, []
    for row, (context, (start, end)) in enumerate(zip(contexts, segments.spans, strict=True)):
        seen = context + end - start
        count = -(-seen // page)
        table[row, :count] = torch.arange(used, used + count).flip(0)
        used += count
        k, v = _draw(2, seen, 8), _draw(2, seen, 8) * 2
        attention.scatter_pages(k_pages, table[row], 0, k)
        attention.scatter_pages(v_pages, table[row], 0, v)
        scores = q[:, start:end] @ k.repeat_interleave(2, 0).transpose(1, 2) / math.sqrt(8)
        future = torch.ones(end - start, seen, dtype=torch.bool).triu(context + 1)
        expected.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v.repeat_interleave(2, 0))
    out = prompt_attention(q, k_pages, v_pages, table, torch.tensor(contexts, dtype=torch.int32), segments)
    torch.testing.assert_close(out, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
