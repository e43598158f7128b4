"""Continuous batching in the denoiser: one call, one forward for every block that is under way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from twotower.engine.logprobs import token_logprobs
from twotower.engine.refinement import Refinement
from twotower.engine.sampling import filters, uniforms
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.state import ContextState
from twotower.request import GenerationParams, TokenLogprob


class DenoiserEngine:
    """Advances blocks of different sessions, each at its own step, t, gamma, temperature and seed."""

    def __init__(self, tower: DenoiserTower) -> None:
        self.tower = tower
        self.mask_id = tower.config.mask_token_id

    def start(self, params: GenerationParams, state: ContextState, generated: int) -> Refinement:
        """A block of masks behind `state`, `generated` tokens into the session."""
        return Refinement(params, state, generated, self.mask_id)

    def step(self, blocks: Iterable[Refinement]) -> None:
        """One forward for each block; blocks of one size share it."""
        by_size: dict[int, list[Refinement]] = defaultdict(list)
        for block in blocks:
            by_size[block.params.block_size].append(block)
        for group in by_size.values():
            self._step(sorted(group, key=lambda block: block.state.slot))

    @torch.inference_mode()
    def _step(self, blocks: Sequence[Refinement]) -> None:
        device = self.tower.device
        size = blocks[0].params.block_size
        tokens = torch.stack([block.tokens for block in blocks]).to(device)
        masked = torch.stack([block.masked for block in blocks]).to(device)
        t = torch.tensor([block.masked_share for block in blocks], dtype=torch.float32, device=device)
        logits = self.tower.denoise(tokens, t, [block.state for block in blocks])
        result = self.tower.kernels.unmask(
            logits,
            tokens,
            masked,
            mask_id=self.mask_id,
            gamma=torch.tensor([block.params.gamma for block in blocks], device=device),
            steps_left=torch.tensor([block.steps_left for block in blocks], device=device),
            temperature=torch.tensor([block.params.temperature for block in blocks], device=device),
            uniforms=self._uniforms(blocks, size).to(device),
            **filters([block.params for block in blocks], device),
        )
        lefts = result.masked.sum(-1).tolist()
        for i, (block, left, finite) in enumerate(zip(blocks, lefts, result.finite.tolist(), strict=True)):
            logprobs = self._logprobs(block, logits[i], result.tokens[i], masked[i] & ~result.masked[i])
            block.advance(result.tokens[i].cpu(), result.masked[i].cpu(), left, finite, logprobs)

    def _logprobs(self, block: Refinement, logits: Tensor, tokens: Tensor, chosen: Tensor) -> dict[int, TokenLogprob]:
        """By position, of the tokens that a forward has chosen, if the block's request asks for them.

        logits (L, V) fp32; tokens (L,) int64; chosen (L,) bool.
        """
        if block.params.logprobs is None:
            return {}
        logprobs = token_logprobs(logits[chosen], tokens[chosen], block.params.logprobs, self.mask_id)
        return dict(zip(chosen.nonzero().squeeze(-1).tolist(), logprobs, strict=True))

    @staticmethod
    def _uniforms(blocks: Sequence[Refinement], size: int) -> torch.Tensor:
        """(B, size) fp64; greedy rows need none."""
        rows = torch.zeros(len(blocks), size, dtype=torch.float64)
        for row, block in zip(rows, blocks, strict=True):
            if block.params.temperature > 0:
                row.copy_(uniforms(block.params.seed, block.generated, block.forwards, size))
        return rows
