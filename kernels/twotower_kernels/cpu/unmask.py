"""Confidence unmasking on a CPU (`unmask.cpp`)."""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from twotower_kernels import unmask as plain
from twotower_kernels.cpu.build import library_for


def predict(
    logits: Tensor, masked: Tensor, temperature: Tensor, uniforms: Tensor, top_k: Tensor | None, top_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `twotower_kernels.unmask.predict`, in two passes over the masked positions' logits."""
    library = library_for(logits) if logits.dtype == torch.float32 and logits.is_contiguous() else None
    if library is None:
        return plain.predict(logits, masked, temperature, uniforms, top_k, top_p)
    predicted, highest, total = _best(library, logits, masked.contiguous())
    hot = ((temperature > 0) & masked).nonzero().squeeze(-1)
    if hot.numel():
        choice = (None if x is None else x[hot] for x in (top_k, top_p))
        predicted[hot] = plain.draw(logits[hot], temperature[hot], uniforms[hot], *choice)
    at = logits.gather(-1, predicted.unsqueeze(-1)).squeeze(-1)
    return predicted, (at - highest).exp() / total


unmask = partial(plain.unmask, predict=predict)
"""As `twotower_kernels.unmask.unmask`."""


def _best(library: ctypes.CDLL, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For rows of logits (N, V) where wanted (N,) bool, returns the likeliest tokens (N,) int64, their logits and the sums of
    exp(logit - highest), both (N,) fp32, NaN where no token is the likeliest. For other rows it returns 0, 0 and 1."""
    n, vocab = logits.shape
    tokens, highest, total = torch.empty(n, dtype=torch.int64), torch.empty(n), torch.empty(n)
    library.tt_best(
        *(logits.data_ptr(), wanted.data_ptr(), tokens.data_ptr(), highest.data_ptr(), total.data_ptr()),
        *(n, vocab, torch.get_num_threads()),
    )
    return tokens, highest, total
