"""Both towers in one process over many requests: continuous batching without services.

What the services are measured against, and what `twotower eval` runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.refinement import Refinement
from twotower.engine.session import Session, room_for
from twotower.errors import InvalidArgument
from twotower.model.pool import PoolSize, StatePool, pages_for
from twotower.request import FinishReason, GenerationParams, Mode


@dataclass(slots=True)
class Completion:
    """A request's result, as it was in its batch."""

    index: int
    """Its place among the requests."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.LENGTH
    forwards: int = 0
    """Of the denoiser; in AR mode, of the context tower."""
    blocks: int = 0
    first_block_s: float = 0.0
    """From its start (its prefill included) to its first block."""
    seconds: float = 0.0
    """From its start to its end."""


class _Running:
    """A request that holds one of the batch's places."""

    def __init__(self, index: int, session: Session) -> None:
        self.session = session
        self.result = Completion(index)
        self.block: Refinement | None = None
        self._started = time.perf_counter()

    def take(self, tokens: list[int], forwards: int) -> bool:
        """A finished block; True if the request goes on."""
        result = self.result
        result.token_ids += self.session.emit(tokens)
        result.forwards += forwards
        result.blocks += 1
        result.seconds = time.perf_counter() - self._started
        result.first_block_s = result.first_block_s or result.seconds
        if self.session.finish_reason is not None:
            result.finish_reason = self.session.finish_reason
            return False
        return True


def generate_batch(
    context: ContextEngine,
    denoiser: DenoiserEngine,
    prompts: Sequence[Sequence[int]],
    params: GenerationParams,
    batch: int,
    prefill_chunk: int = 128,
    prefill_budget: int = 512,
) -> Iterator[Completion]:
    """Continue all prompts, at most `batch` at a time; a place that becomes free is taken at once.

    prefill_chunk: prompt tokens of a session in a forward; prefill_budget: about how many of all sessions.
    Yields in order of completion. Raises NonFiniteLogits; InvalidArgument for mock-AR, which has no batch.
    """
    if params.mode is Mode.MOCK_AR:
        raise InvalidArgument("mode", "mock-ar has no batched form")
    if not all(prompts):
        raise InvalidArgument("prompt", "must not be empty")
    pool = _pool(context, prompts, params, batch)
    waiting = enumerate(prompts)
    running: list[_Running] = []
    while True:
        while len(running) < batch and (request := next(waiting, None)) is not None:
            index, prompt = request
            state = pool.acquire(room_for(len(prompt), 0, params)) if pool else None
            running.append(_Running(index, context.open(str(index), list(prompt), params, state=state)))
        _read(context, [one.session for one in running], prefill_chunk, prefill_budget)
        if not running:
            return
        step = _decode if params.mode is Mode.AR else _refine
        ended = step(context, denoiser, running)
        running = [one for one in running if one not in ended]
        if pool:
            for one in ended:
                pool.release(one.session.state)
        yield from (one.result for one in ended)


def _pool(context: ContextEngine, prompts: Sequence[Sequence[int]], params: GenerationParams, batch: int) -> StatePool | None:
    """Room for the longest of the prompts at every place.

    A single one's state is its own, and grows with it, unless the kernels know no other than a pool's.
    """
    tower = context.tower
    if not prompts or (batch == 1 and not tower.kernels.paged):
        return None
    longest = max(map(len, prompts))
    size = PoolSize(batch, batch * pages_for(room_for(longest, 0, params)))
    return StatePool(tower.config, tower.dtype, tower.device, size)


def _read(context: ContextEngine, sessions: Sequence[Session], chunk: int, budget: int) -> None:
    """The prompts of all that have one, together, in chunks that end at multiples of `chunk`."""
    while unread := [session for session in sessions if session.prefill_left]:
        chunks: list[tuple[Session, int]] = []
        for session in unread:
            if sum(tokens for _, tokens in chunks) < budget:
                chunks.append((session, min(chunk - session.state.length % chunk, session.prefill_left)))
        context.read(chunks)


def _decode(context: ContextEngine, denoiser: DenoiserEngine, running: list[_Running]) -> list[_Running]:
    """One AR token for each; returns those that ended."""
    ended = []
    for one, token in zip(running, context.decode([one.session for one in running]), strict=True):
        if not isinstance(token, int):
            raise token
        if not one.take([token], 1):
            ended.append(one)
    return ended


def _refine(context: ContextEngine, denoiser: DenoiserEngine, running: list[_Running]) -> list[_Running]:
    """One denoiser forward for each, and a commit for those whose block is done; returns those that ended."""
    for one in running:
        if one.block is None:
            one.block = denoiser.start(one.session.params, one.session.state, one.session.generated)
    denoiser.step([one.block for one in running if one.block is not None])
    ended, commits = [], []
    for one in running:
        block = one.block
        if block is None or not block.done:
            continue
        if block.error is not None:
            raise block.error
        one.block, tokens = None, block.tokens.tolist()
        if one.take(tokens, block.forwards):
            commits.append((one.session, tokens))
        else:
            ended.append(one)
    if commits:
        context.commit(commits)
    return ended
