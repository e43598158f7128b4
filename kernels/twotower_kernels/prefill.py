"""Chunks of several prompts in one forward: the scan and the attention, which each chunk needs separately.

All other work of a forward is row by row and takes the chunks as one long chunk: they follow one another on an axis of
N positions (`Segments`).

Letters in shapes: N positions in all, B chunks, h heads, p head_dim, g groups, n state size, K conv kernel,
C = h p + 2 g n channels of the conv.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from twotower_kernels.attention import attend, gather_pages
from twotower_kernels.block import ScanWeights, finish, mix
from twotower_kernels.scan import chunk_scan


class Segments:
    """Which positions belong to which chunk: B chunks of at least one position each, one after the other."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """lengths: the chunks' lengths, in order; device: where kernels read them."""
        assert lengths
        assert min(lengths) >= 1
        self.lengths = tuple(lengths)
        self.device = device
        self.ends = tuple(accumulate(lengths))
        self._tiles: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """N, the number of positions in all chunks."""
        return self.ends[-1]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """[start, end) of each chunk."""
        return [(end - length, end) for length, end in zip(self.lengths, self.ends, strict=True)]

    @cached_property
    def borders(self) -> Tensor:
        """(B + 1,) int64: where each chunk starts, and the end of the last."""
        return torch.tensor((0, *self.ends), dtype=torch.int64).to(self.device)

    @cached_property
    def numbers(self) -> tuple[Tensor, Tensor]:
        """The chunk of each position, and the position's index within it: (N,) int64 each."""
        starts = torch.tensor((0, *self.ends[:-1]))
        rows = torch.arange(len(self)).repeat_interleave(torch.tensor(self.lengths))
        both = torch.stack((rows, torch.arange(self.total) - starts[rows])).to(self.device)
        return both[0], both[1]

    def tiles(self, size: int) -> Tensor:
        """The chunks cut into pieces of at most `size` positions: (T, 2) int32, a piece's chunk and first position in it.

        A kernel runs one program for each piece, so that there are no idle programs, however ragged the chunks are.
        """
        if size not in self._tiles:
            pieces = [(row, first) for row, length in enumerate(self.lengths) for first in range(0, length, size)]
            self._tiles[size] = torch.tensor(pieces, dtype=torch.int32).to(self.device)
        return self._tiles[size]


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
    """As `twotower_kernels.block.block_scan_commit`, over chunks of any lengths. The context runs this for prompts.

    projected (N, h p + C + h), contiguous in its last axis; conv_tail (B, C, K) and ssm (B, h, p, n) fp32, or with `slots`
    (B,) int64, distinct, pools of them; both are changed in place. Every `chunk` positions are laid out as
    products of matrices (`chunk_scan`). It makes no factors, and S need not have the bits that factors would give.
    Returns (N, h p). Each chunk is computed by itself: how many there are does not change its bits.
    """
    assert projected.shape[0] == segments.total
    at = range(len(segments)) if slots is None else slots.tolist()
    out = []
    for row, (start, end) in zip(at, segments.spans, strict=True):
        tail, state = conv_tail[row : row + 1], ssm[row : row + 1]
        z, f, c = mix(projected[start:end].unsqueeze(0), tail, weights)
        y, final, _ = chunk_scan(f.x, f.dt, weights.a, f.b, c, state, chunk)
        tail.copy_(f.conv)
        state.copy_(final)
        out.append(finish(y, f.x, z, weights)[0])
    return out[0] if len(out) == 1 else torch.cat(out)


def prompt_attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lengths: Tensor, segments: Segments) -> Tensor:
    """Causal attention of each chunk over its own session's pages, which already hold the chunk's K and V.

    q (heads, N, d); k_pages and v_pages (pages, kv_heads, page, d); table (B, width) int32 page numbers; lengths (B,) int32:
    tokens of each session before its chunk, 0 allowed. A position sees these and the chunk's up to itself; page
    contents beyond the chunk are never read. Returns (heads, N, d) in q's dtype.
    """
    assert table.shape[0] == lengths.shape[0] == len(segments)
    assert q.shape[1] == segments.total
    out = torch.empty_like(q)
    for row, (start, end) in enumerate(segments.spans):
        seen = int(lengths[row]) + end - start
        keys, values = (gather_pages(pages, table[row], seen).unsqueeze(0) for pages in (k_pages, v_pages))
        out[:, start:end] = attend(q[:, start:end].unsqueeze(0), keys, values, causal=True)[0]
    return out
