"""Randomness that depends on a request's seed and the place in its text, and on nothing else."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, generated: int, step: int, count: int) -> Tensor:
    """(count,) fp64 in [0, 1), a function of its arguments alone.

    generated: tokens the session had generated before this block or token; step: of the refinement.
    A session that is requeued, moved or batched differently draws the same numbers again.
    """
    bits = np.random.Philox(key=np.array([seed, (generated << 20) | step], dtype=np.uint64))
    return torch.from_numpy(np.random.Generator(bits).random(count))
