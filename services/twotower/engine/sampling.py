"""Randomness that depends on a request's seed and the place in its text, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from twotower.request import GenerationParams


def uniforms(seed: int, generated: int, step: int, count: int) -> Tensor:
    """(count,) fp64 in [0, 1), a function of its arguments alone.

    generated: tokens the session had generated before this block or token; step: of the refinement.
    A session that is requeued, moved or batched differently draws the same numbers again.
    """
    bits = np.random.Philox(key=np.array([seed, (generated << 20) | step], dtype=np.uint64))
    return torch.from_numpy(np.random.Generator(bits).random(count))


def ar_uniforms(seed: int, generated: int, count: int) -> Tensor:
    """(count,) fp64: what AR draws its next `count` tokens with, after `generated` ones. A draft is drawn with the same."""
    return torch.cat([uniforms(seed, generated + i, 0, 1) for i in range(count)])


class Filters(TypedDict):
    """What of `draw` a batch asks for."""

    top_k: Tensor | None
    top_p: Tensor | None


def filters(params: Sequence[GenerationParams], device: torch.device) -> Filters:
    """top_k and top_p of each row, or None where no row that draws asks for them: they cost a sort of the vocabulary."""
    if not any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in params):
        return Filters(top_k=None, top_p=None)
    return Filters(
        top_k=torch.tensor([p.top_k for p in params], device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
    )
