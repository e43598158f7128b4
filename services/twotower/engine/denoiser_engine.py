"""Continuous batching in the denoiser: one call, one forward for every block that is under way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from twotower.engine.graphs import (
    Graphs,
    Program,
    WarmUp,
    batch_bucket,
    common_pool,
    scratch_ints,
    state_ints,
    state_views,
    token_bucket,
    warm_up,
)
from twotower.engine.logprobs import token_logprobs
from twotower.engine.refinement import Refinement
from twotower.engine.sampling import Filters, filters
from twotower.engine.steps import step_of
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.pool import StatePool
from twotower.model.rows import PagedRows
from twotower.model.state import ContextState
from twotower.request import GenerationParams, TokenLogprob

UNFILTERED = Filters(top_k=None, top_p=None)


@dataclass(frozen=True, slots=True)
class _Stepped:
    """What a forward and the choice of its tokens come to, on the device."""

    outcome: Tensor
    """(B, 2 L + 1) int64: the new tokens, where they are still masked, and whether all was finite."""
    logits: Tensor
    """(B, L, V) fp32; the mask id's may be overwritten."""


class DenoiserEngine:
    """Advances blocks of different sessions, each at its own step, t, gamma, temperature and seed."""

    def __init__(self, tower: DenoiserTower, *, graphs: bool | None = None) -> None:
        """graphs: whether forwards over a pool go through `engine.graphs`; None: on a GPU, with kernels made for it."""
        self.tower = tower
        self.mask_id = tower.config.mask_token_id
        use = tower.device.type == "cuda" if graphs is None else graphs
        self._graphs: Graphs[_Stepped] | None = Graphs(tower.device) if use and tower.kernels.paged else None

    def start(
        self,
        params: GenerationParams,
        state: ContextState,
        generated: int,
        known: int | None = None,
        steps: int | None = None,
    ) -> Refinement:
        """A block of masks behind `state`, `generated` tokens into the session; known, steps: see `Refinement`."""
        return Refinement(params, state, generated, self.mask_id, known, steps)

    def step(self, blocks: Iterable[Refinement]) -> None:
        """One forward for each block; blocks of one size share it."""
        by_size: dict[int, list[Refinement]] = defaultdict(list)
        for block in blocks:
            by_size[block.params.block_size].append(block)
        for group in by_size.values():
            self._step(sorted(group, key=lambda block: block.state.slot))

    @torch.inference_mode()
    def _step(self, blocks: Sequence[Refinement]) -> None:
        device, size = self.tower.device, blocks[0].params.block_size
        states, choice = [block.state for block in blocks], filters([block.params for block in blocks], device)
        pool = None if self._graphs is None or choice["top_k"] is not None else common_pool(self.tower, states)
        before = torch.stack([block.masked for block in blocks])
        if pool is None:
            ints, reals = (rows.to(device) for rows in _rows(blocks, before))
            stepped = self._program(ints, reals, lambda tokens, t: self.tower.denoise(tokens, t, states), choice)
        else:
            stepped = self._replay(pool, blocks, before)
        outcome = stepped.outcome[: len(blocks)].cpu()  # the only transfer from the device
        tokens, masked, finite = outcome[:, :size], outcome[:, size : 2 * size].bool(), outcome[:, -1].tolist()
        rows = zip(blocks, tokens.unbind(), masked.unbind(), masked.sum(-1).tolist(), strict=True)
        for i, (block, new, still, left) in enumerate(rows):
            asked = block.wants_logprobs
            logprobs = self._logprobs(block, stepped.logits[i], new, before[i] & ~still) if asked else None
            if block.params.show_steps and finite[i]:
                number = block.forwards + 1
                block.step = step_of(number, stepped.logits[i], new, still, before[i], self.mask_id, block.step)
            block.advance(new, still, left, bool(finite[i]), logprobs)

    def _replay(self, pool: StatePool, blocks: Sequence[Refinement], before: Tensor) -> _Stepped:
        assert self._graphs is not None
        longest = token_bucket(max(block.state.length for block in blocks))
        size, missing = before.shape[1], batch_bucket(len(blocks)) - len(blocks)
        idle = self._idle(pool, size, longest)
        ints, reals = _rows(blocks, before)
        numbers = state_ints(pool, [b.state for b in blocks], longest)
        ints = torch.cat([torch.cat([ints, idle[: ints.shape[1]].expand(missing, -1)]), numbers], 1)
        reals = torch.cat([reals, torch.zeros(missing, reals.shape[1], dtype=torch.float64)])
        program, common = self._replayed(pool, size, longest), size == self.tower.config.block_size
        return self._graphs.run(pool, longest, program, ints, reals, idle, common=common)

    @torch.inference_mode()
    def warm_up(self, pool: StatePool, *, batches: Iterable[int], contexts: Iterable[int]) -> WarmUp:
        """Compile and capture steps of the trained block size before the first request, at scratch places of `pool`.

        batches, contexts: of rows and of tokens, as `batch_buckets` and `token_buckets` list them. No effect without graphs.
        """
        graphs, size = self._graphs, self.tower.config.block_size
        if graphs is None:
            return WarmUp(0, 0, 0.0)

        def prepare(longest: int, batch: int) -> bool:
            idle = self._idle(pool, size, longest)
            return graphs.prepare(pool, longest, self._replayed(pool, size, longest), batch, size + 3, idle)

        return warm_up(partial(prepare, longest, batch) for longest in contexts for batch in batches)

    def _replayed(self, pool: StatePool, size: int, longest: int) -> Program[_Stepped]:
        def program(ints: Tensor, reals: Tensor) -> _Stepped:
            slots, table, lengths = state_views(ints[:, 2 * size + 1 :])
            rows = PagedRows(pool, self.tower.kernels, slots, table, lengths, longest)
            return self._program(ints, reals, lambda tokens, t: self.tower.forward_rows(tokens, t, rows), UNFILTERED)

        return program

    def _idle(self, pool: StatePool, size: int, longest: int) -> Tensor:
        """A row that nobody reads: all masks, one step left, at the scratch place."""
        return torch.cat([torch.tensor([*[self.mask_id] * size, *[1] * size, 1]), scratch_ints(pool, longest)])

    def _program(self, ints: Tensor, reals: Tensor, forward: Callable[[Tensor, Tensor], Tensor], choice: Filters) -> _Stepped:
        """One step of blocks from the rows of `_rows`, all on the device. forward: tokens and t -> logits."""
        size = reals.shape[1] - 3
        tokens, masked = ints[:, :size].contiguous(), ints[:, size : 2 * size].bool()
        t, gamma, temperature = reals[:, size:].float().unbind(1)
        logits = forward(tokens, t.contiguous())
        result = self.tower.kernels.unmask(
            logits,
            tokens,
            masked,
            mask_id=self.mask_id,
            gamma=gamma.contiguous(),
            steps_left=ints[:, 2 * size].contiguous(),
            temperature=temperature.contiguous(),
            uniforms=reals[:, :size].contiguous(),
            **choice,
        )
        return _Stepped(torch.cat([result.tokens, result.masked.long(), result.finite.long().unsqueeze(1)], 1), logits)

    def _logprobs(self, block: Refinement, logits: Tensor, tokens: Tensor, chosen: Tensor) -> dict[int, TokenLogprob]:
        """By position, of the tokens that a forward has chosen; for a block whose request asks for them.

        logits (L, V) fp32; tokens (L,) int64 and chosen (L,) bool, on the host.
        """
        assert block.params.logprobs is not None
        places = chosen.nonzero().squeeze(-1)
        of_places, at = logits[places.to(logits.device)], tokens[places].to(logits.device)
        logprobs = token_logprobs(of_places, at, block.params.logprobs, self.mask_id, step=block.forwards + 1)
        return dict(zip(places.tolist(), logprobs, strict=True))


def _rows(blocks: Sequence[Refinement], masked: Tensor) -> tuple[Tensor, Tensor]:
    """What a step reads of its blocks besides their states, on the host.

    Integers (B, 2 L + 1) int64: tokens, masked, steps left. Reals (B, L + 3) fp64: uniforms (greedy rows need none), t, gamma,
    temperature. All travel in two copies.
    """
    size = masked.shape[1]
    steps_left = torch.tensor([[block.steps_left] for block in blocks])
    ints = torch.cat([torch.stack([block.tokens for block in blocks]), masked.long(), steps_left], 1)
    reals = torch.zeros(len(blocks), size + 3, dtype=torch.float64)
    reals[:, size:] = torch.tensor(
        [(block.masked_share, block.params.gamma, block.params.temperature) for block in blocks], dtype=torch.float64
    )
    for row, block in zip(reals, blocks, strict=True):
        if block.params.temperature > 0:
            row[:size] = block.uniforms
    return ints, reals
