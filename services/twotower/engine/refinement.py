"""One block on its way from all masks to all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower.errors import NonFiniteLogits
from twotower.model.state import ContextState
from twotower.request import GenerationParams


class Refinement:
    """A block of one session, at its own step. `DenoiserEngine.step` advances many of them together."""

    def __init__(self, params: GenerationParams, state: ContextState, generated: int, mask_id: int) -> None:
        self.params = params
        self.state = state
        """The session's state at the block's start; read only."""
        self.generated = generated
        """Tokens generated before this block."""
        self.tokens: Tensor = torch.full((params.block_size,), mask_id, dtype=torch.int64)
        self.masked: Tensor = torch.ones(params.block_size, dtype=torch.bool)
        self.left = params.block_size
        """Positions still masked."""
        self.forwards = 0
        self.error: NonFiniteLogits | None = None

    @property
    def done(self) -> bool:
        """Nothing is masked, or the block failed."""
        return self.left == 0 or self.error is not None

    @property
    def masked_share(self) -> float:
        """t of the next forward."""
        return self.left / self.params.block_size

    @property
    def steps_left(self) -> int:
        """Forwards that remain, the next one included."""
        return self.params.steps - self.forwards

    def advance(self, tokens: Tensor, masked: Tensor, left: int, finite: bool) -> None:
        """Take the result of a forward: tokens and masked (L,)."""
        self.forwards += 1
        if not finite:
            self.error = NonFiniteLogits("the denoiser's logits are not finite")
            return
        self.tokens, self.masked, self.left = tokens, masked, left
