"""Attention over paged KV, as plain torch, against attention over K and V that were never cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from twotower_kernels.attention import block_attention, gather_pages, scatter_pages

PAGE, KV_HEADS, DIM = 4, 2, 8


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 12])
def test_pages_hold_what_was_written(length: int) -> None:
    pages = torch.full((5, KV_HEADS, PAGE, DIM), math.nan)
    table = torch.tensor([3, 0, 4], dtype=torch.int32)
    rows = _draw(KV_HEADS, length, DIM)
    half = length // 2
    scatter_pages(pages, table, 0, rows[:, :half])
    scatter_pages(pages, table, half, rows[:, half:])
    assert torch.equal(gather_pages(pages, table, length), rows)
    assert pages[[1, 2]].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [2, 6])
def test_rows_of_all_lengths(heads: int, causal: bool) -> None:
    lengths, block = [0, 1, 4, 9], 3
    q = _draw(len(lengths), heads, block, DIM)
    k, v = _draw(2, len(lengths), KV_HEADS, block, DIM).unbind(0)
    k_pages, v_pages = torch.full((2, 16, KV_HEADS, PAGE, DIM), math.nan).unbind(0)
    # Pages of the rows interleaved; behind the last page, a number that no page has.
    table = torch.full((len(lengths), 4), 99, dtype=torch.int32)
    contexts = []
    for row, length in enumerate(lengths):
        used = -(-length // PAGE)
        table[row, :used] = torch.arange(used, dtype=torch.int32) * len(lengths) + row
        keys, values = _draw(2, KV_HEADS, length, DIM).unbind(0)
        scatter_pages(k_pages, table[row], 0, keys)
        scatter_pages(v_pages, table[row], 0, values)
        contexts.append((keys, values))
    out = block_attention(q, k, v, k_pages, v_pages, table, torch.tensor(lengths, dtype=torch.int32), causal=causal)
    for row, (keys, values) in enumerate(contexts):
        for head in range(heads):
            kv = head // (heads // KV_HEADS)
            for i in range(block):
                end = i + 1 if causal else block
                seen_k = torch.cat([keys[kv], k[row, kv, :end]])
                seen_v = torch.cat([values[kv], v[row, kv, :end]])
                weights = (seen_k @ q[row, head, i] / math.sqrt(DIM)).softmax(0)
                torch.testing.assert_close(out[row, head, i], weights @ seen_v, rtol=1e-5, atol=1e-5)
