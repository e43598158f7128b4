"""A block on its way, for whoever wants to watch: what a forward made of it, and what it would say of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.request import BlockStep


def step_of(
    number: int, logits: Tensor, tokens: Tensor, masked: Tensor, before: Tensor, mask_id: int, last: BlockStep | None
) -> BlockStep:
    """The block after a forward.

    number: of the forward, from 1. logits (L, V) fp32, on the device, only read; on the host: tokens (L,) int64 and masked (L,)
    bool, which positions are masked now, and before (L,) bool, which were. last: the step before.
    """
    logits = logits.clone()
    logits[:, mask_id] = -torch.inf
    likeliest = logits.argmax(-1)
    told = torch.where(masked.to(logits.device), likeliest, tokens.to(logits.device))
    confidence = (logits.gather(-1, told.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).exp().tolist()
    if last is not None:  # what was committed earlier keeps what it was committed with
        confidence = [new if was else old for new, old, was in zip(confidence, last.confidence, before.tolist(), strict=True)]
    committed = tuple(not still for still in masked.tolist())
    return BlockStep(number, tuple(told.tolist()), committed, tuple(confidence))
