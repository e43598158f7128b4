"""The Mamba-2 recurrence in fp32: over a chunked sequence, and as the exact rank-1 updates of a commit.

Per head (docs/model.md, Mamba-2 layer): ``S <- exp(dt a) S + dt x (x) b``, ``y = S c``. Head ``i`` uses group
``i // (heads / groups)`` of b and c. All states and all arithmetic are fp32: with long contexts S
grows past 1e3 and a bf16 scan overflows.

Letters in shapes: B batch, L length, h heads, p head_dim, g groups, n state size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from twotower_kernels.cpu import factors as cpu


def chunk_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, chunk: int, *, need_states: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over L positions from a seed state, a chunk at a time, by matrix products.

    x (B, L, h, p), dt (B, L, h) after softplus and clamp, a (h,) negative, b and c (B, L, g, n),
    state (B, h, p, n). The last chunk may be shorter, and so may the sequence: padding
    positions have dt = 0, which neither decays nor adds. Differentiable.

    Returns y (B, L, h, p), the final state (B, h, p, n), and the states at the chunks' starts
    (B, chunks, h, p, n); with ``need_states=False`` the last two are of the seed only, at no cost.
    Decays are exp of non-positive sums, so nothing overflows.
    """
    batch, length, heads, head_dim = x.shape
    groups, n = b.shape[-2:]
    assert dt.shape == (batch, length, heads)
    assert a.shape == (heads,)
    assert c.shape == b.shape == (batch, length, groups, n)
    assert state.shape == (batch, heads, head_dim, n)
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    if need_states is False:
        assert chunks == 1, "without states there is nothing to carry from chunk to chunk"
    x, dt, b, c = (_in_chunks(v.float(), chunks, chunk) for v in (x, dt, b, c))
    # (B, chunks, h, chunk): log of the decay from the chunk's start up to and including each position.
    log_decay = (dt * a).transpose(2, 3).cumsum(-1)
    dtx = (dt.unsqueeze(-1) * x).transpose(2, 3)  # (B, chunks, h, chunk, p)
    b, c = b.transpose(2, 3), c.transpose(2, 3)  # (B, chunks, g, chunk, n)
    # Within a chunk: y_i = sum over j <= i of (c_i . b_j) exp(decay j..i) dt_j x_j.
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
    scores = _to_heads(c @ b.transpose(-1, -2), heads) * decay
    y = scores @ dtx
    starts = state.float().unsqueeze(1)
    final = state
    if need_states:
        # What each chunk adds to the state at its end, then the carry from chunk to chunk.
        left = (log_decay[..., -1:] - log_decay).exp().unsqueeze(-1)
        added = (dtx * left).transpose(-1, -2) @ _to_heads(b, heads)
        whole = log_decay[..., -1].exp()[..., None, None]
        carried = [state.float()]
        for i in range(chunks):
            carried.append(carried[-1] * whole[:, i] + added[:, i])
        starts, final = torch.stack(carried[:-1], 1), carried[-1]
    y = y + (_to_heads(c, heads) @ starts.transpose(-1, -2)) * log_decay.exp().unsqueeze(-1)
    y = y.transpose(2, 3).reshape(batch, chunks * chunk, heads, head_dim)[:, :length]
    return y, final, starts


def apply_factors_(
    state: Tensor,
    x: Tensor,
    b: Tensor,
    dt: Tensor,
    a: Tensor,
    *,
    slots: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Take a state past L positions, in place, by the factors of their updates. The bits are the same on every backend.

    state (..., h, p, n) fp32, x (..., L, h, p), b (..., L, g, n), dt (..., L, h) fp32, a (h,) fp32; `...` is nothing,
    or a batch axis. With `slots` (B,) int64, distinct, state is a pool (slots, h, p, n), of which these change.
    With `counts` (B,) int64, each 0 to L, only the first counts[i] positions of row i are applied, as if alone.
    Both ends of a session call this with equal inputs. It is elementwise and in order of position: S * decay, rounded,
    then a fused multiply-add of dt x and b. So neither the batch, nor the number of threads, nor which of the
    two forms below runs can change a bit.
    """
    heads = state.shape[-3]
    assert x.shape[-2:] == state.shape[-3:-1]
    assert b.shape[-1] == state.shape[-1]
    assert dt.shape == x.shape[:-1]
    assert counts is None or counts.shape == x.shape[:-3] != ()
    decay = (dt * a).exp()
    library = cpu.library_for_factors(state, x, b, dt)
    if library is not None:
        if x.dim() == 3:
            state, x, b, dt, decay = (t.unsqueeze(0) for t in (state, x, b, dt, decay))
        cpu.apply_factors(library, state, x, b, dt, decay, slots, counts)
        return
    rows = state if slots is None else state.index_select(0, slots)
    decay = decay[..., None, None]
    dtx = (dt.unsqueeze(-1) * x.float()).unsqueeze(-1)
    added = b.float().repeat_interleave(heads // b.shape[-2], -2).unsqueeze(-2)
    for i in range(x.shape[-3]):
        moved = rows if counts is None else rows.clone()
        moved.mul_(decay.select(-4, i)).addcmul_(dtx.select(-4, i), added.select(-4, i))
        rows = moved if counts is None else torch.where((counts > i).view(-1, 1, 1, 1), moved, rows)
    if slots is None:
        if rows is not state:
            state.copy_(rows)
    else:
        state.index_copy_(0, slots, rows)


def apply_factors(state: Tensor, x: Tensor, b: Tensor, dt: Tensor, a: Tensor) -> Tensor:
    """As `apply_factors_`, but returns a new tensor."""
    new = state.clone()
    apply_factors_(new, x, b, dt, a)
    return new


def chunk_scan_ref(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as it is defined, one position after another. Shapes as in `chunk_scan`."""
    heads = x.shape[2]
    b, c = (v.float().repeat_interleave(heads // v.shape[2], 2) for v in (b, c))
    ys = []
    for i in range(x.shape[1]):
        decay = (dt[:, i] * a).exp()[..., None, None]
        state = state * decay + (dt[:, i, :, None] * x[:, i].float()).unsqueeze(-1) * b[:, i].unsqueeze(-2)
        ys.append((state * c[:, i].unsqueeze(-2)).sum(-1))
    return torch.stack(ys, 1), state


def _in_chunks(v: Tensor, chunks: int, chunk: int) -> Tensor:
    """(B, L, ...) -> (B, chunks, chunk, ...), padded with zeros."""
    missing = chunks * chunk - v.shape[1]
    if missing:
        v = F.pad(v, (0, 0) * (v.dim() - 2) + (0, missing))
    return v.unflatten(1, (chunks, chunk))


def _to_heads(v: Tensor, heads: int) -> Tensor:
    """(B, chunks, g, ...) -> (B, chunks, h, ...): all heads of a group get the same values."""
    groups = v.shape[2]
    return v if groups == heads else v.repeat_interleave(heads // groups, 2)
