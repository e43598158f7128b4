"""Attention of a short block over a context's K and V in pages, and over the block's own.

A page holds K (or V) of `page` consecutive tokens of one session, all KV heads, as (kv_heads, page, head_dim):
a tile of one head is contiguous. A session is a row of page numbers, its last page partly filled. Query head i
reads KV head i // (heads / kv_heads). No position encoding, scale 1/sqrt(head_dim).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gather_pages(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Gather one session's K or V into one tensor.

    pages (pages, kv_heads, page, d), table (width,) integer, of which ceil(length / page) are read.
    Returns (kv_heads, length, d), a copy.
    """
    used = -(-length // pages.shape[2])
    assert used <= table.shape[0]
    return pages[table[:used].long()].transpose(0, 1).flatten(1, 2)[:, :length]


def scatter_pages(pages: Tensor, table: Tensor, start: int, rows: Tensor) -> None:
    """Write rows (kv_heads, L, d) at positions [start, start + L) of the session that `table` (width,) lists."""
    page = pages.shape[2]
    at = torch.arange(start, start + rows.shape[1], device=pages.device)
    pages[table.long()[at // page], :, at % page] = rows.transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Attention over keys in one tensor, in which the block's own keys come last.

    q (B, heads, L, d), k and v (B, kv_heads, N, d). Every query sees all keys; if `causal`, position i
    sees the first N - L + i + 1. Returns (B, heads, L, d).
    """
    batch, heads, length, d = q.shape
    if causal and length > 1:
        mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - length)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    # Without a mask, the queries of one KV head are one matrix.
    out = F.scaled_dot_product_attention(q.reshape(batch, k.shape[1], -1, d), k, v)
    # This copies where the library chose another memory layout for its output, as it does on GPUs.
    return out.reshape(batch, heads, length, d)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    causal: bool = False,
    max_length: int | None = None,
) -> Tensor:
    """Attention of each row's block over [its context, the block], row by row: the reference for the other forms.

    q (B, heads, L, d), k and v (B, kv_heads, L, d): the block's; k_pages and v_pages (pages, kv_heads, page, d),
    table (B, width) int32 page numbers, lengths (B,) int32 of the contexts, 0 allowed. Page contents beyond a
    context's length are never read, nor are page numbers beyond its last page.
    Every query sees the whole block, as in the denoiser; with `causal` it sees the block's positions up to its own,
    as in a commit. max_length: an upper bound of the lengths, for forms that cannot read them on the host.
    Returns (B, heads, L, d) in q's dtype.
    """
    batch, heads, length, d = q.shape
    kv_heads = k.shape[1]
    assert heads % kv_heads == 0
    assert k.shape == v.shape == (batch, kv_heads, length, d)
    assert k_pages.shape == v_pages.shape
    assert k_pages.shape[1] == kv_heads
    assert k_pages.shape[3] == d
    assert table.shape[0] == lengths.shape[0] == batch
    out = torch.empty_like(q)
    for row, context in enumerate(lengths.tolist()):
        keys = torch.cat([gather_pages(k_pages, table[row], context), k[row]], 1)
        values = torch.cat([gather_pages(v_pages, table[row], context), v[row]], 1)
        mask = None
        if causal:
            mask = torch.ones(length, context + length, dtype=torch.bool, device=q.device).tril(context)
        out[row] = F.scaled_dot_product_attention(q[row], keys, values, attn_mask=mask, enable_gqa=True)
    return out
