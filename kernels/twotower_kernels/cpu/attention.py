"""Attention of a session's block on a CPU (`attention.cpp`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twotower_kernels import attention as plain
from twotower_kernels.cpu.build import check, library_for


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """As `twotower_kernels.attention.attend`; our own kernel serves single sessions in bf16.

    Its sums are fp32 and its attention weights bf16, like the library's. Returns a view whose heads join without a copy.
    """
    library = library_for(q, k, v) if _fits(q, k, v) else None
    if library is None:
        return plain.attend(q, k, v, causal=causal)
    _, heads, length, dim = q.shape
    _, kv_heads, keys, _ = k.shape
    out = torch.empty(1, length, heads, dim, dtype=torch.bfloat16)
    failed = library.tt_attend(
        *(q.data_ptr(), q.stride(1), q.stride(2), k.data_ptr(), k.stride(1), v.data_ptr(), v.stride(1), out.data_ptr()),
        *(heads, kv_heads, length, keys, dim, causal, 1 / math.sqrt(dim), torch.get_num_threads()),
    )
    check(failed, f"attention over {keys} tokens")
    return out.transpose(1, 2)


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    dim = q.shape[-1]
    return (
        q.dtype == k.dtype == v.dtype == torch.bfloat16
        and q.shape[0] == 1
        and dim % 32 == 0
        and q.stride(3) == 1
        and all(rows.stride()[2:] == (dim, 1) or rows.shape[2] == 1 for rows in (k, v))
    )
