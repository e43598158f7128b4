"""Both towers in one process over many requests: continuous batching without services.

What the services are measured against, and what `twotower eval` runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.effort import Effort, Times
from twotower.engine.refinement import Refinement
from twotower.engine.session import Piece, Session, room_for
from twotower.errors import InvalidArgument
from twotower.model.pool import PoolSize, StatePool, pages_for
from twotower.request import NO_DRAFT, DraftUse, FinishReason, GenerationParams, Mode


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
    rounds: int = 0
    """Drafts that were verified, in speculative mode."""
    use: DraftUse = NO_DRAFT
    """Of all rounds, and AR steps, in speculative mode."""
    first_block_s: float = 0.0
    """From its start (its prefill included) to its first block."""
    seconds: float = 0.0
    """From its start to its end."""


class _Running:
    """A request that holds one of the batch's places."""

    def __init__(self, index: int, session: Session, times: Times) -> None:
        """times: of what a draft takes and earns."""
        self.session = session
        self.result = Completion(index)
        self.block: Refinement | None = None
        params = session.params
        self.effort = Effort(params.block_size, params.steps, times)
        """In speculative mode, what its drafts may cost."""
        self._started = time.perf_counter()

    def take(self, tokens: list[int], forwards: int, use: DraftUse = NO_DRAFT) -> bool:
        """A finished block; True if the request goes on."""
        result = self.result
        shown = self.session.emit(tokens)
        result.token_ids += shown
        result.forwards += forwards
        result.use += use.shown(len(shown))
        result.rounds += use.drafted > 0
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
            session = context.open(str(index), list(prompt), params, state=state)
            running.append(_Running(index, session, context.times))
        _read(context, [one.session for one in running], prefill_chunk, prefill_budget)
        if not running:
            return
        if params.mode is Mode.AR:
            ended = _decode(context, running)
        elif params.mode is Mode.SPECULATIVE:
            ended = _speculate(context, denoiser, running)
        else:
            ended = _refine(context, denoiser, running)
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


def _decode(context: ContextEngine, running: list[_Running]) -> list[_Running]:
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


def _speculate(context: ContextEngine, denoiser: DenoiserEngine, running: list[_Running]) -> list[_Running]:
    """A denoiser forward for each draft, a verification for those that are done, an AR step for the others; who ended."""
    clock, times = time.perf_counter, context.times
    steps: list[_Running] = []
    drafts: list[_Running] = []
    ended: list[_Running] = []
    for one in running:
        session, effort = one.session, one.effort
        if one.block is None and session.pending is not None and (forwards := effort.choose()):
            one.block = denoiser.start(session.params, session.state, session.generated, session.pending, forwards)
        (steps if one.block is None else drafts).append(one)
    if steps:
        behind = [one for one in steps if one.session.pending is not None]
        started = clock()
        for one, token in zip(steps, context.decode([one.session for one in steps]), strict=True):
            if not isinstance(token, int):
                raise token
            one.effort.stepped()
            if not one.take([token], 0, DraftUse(context_forwards=int(one in behind))):
                ended.append(one)
        if len(behind) == len(steps):
            times.measured("token", clock() - started)
    if not drafts:
        return ended
    started = clock()
    denoiser.step([one.block for one in drafts if one.block is not None])
    times.measured("step", clock() - started)
    done = [(one, one.block) for one in drafts if one.block is not None and one.block.done]
    for one, block in done:
        one.block = None
        if block.error is not None:  # the text is the context's: it goes on without
            one.effort.give_up()
    done = sorted(((o, b) for o, b in done if b.error is None), key=lambda pair: pair[0].session.state.slot)
    if not done:
        return ended
    started = clock()
    _, rounds = context.advance([(one.session, Piece(block.tokens.tolist(), None)) for one, block in done])
    times.measured("commit", clock() - started)
    for (one, block), verified in zip(done, rounds, strict=True):
        assert verified is not None
        if verified.error is not None:
            raise verified.error
        one.effort.verified(len(verified.tokens), times)
        if not one.take(verified.tokens, block.forwards, verified.use(block.tokens.shape[0])):
            ended.append(one)
    return ended
