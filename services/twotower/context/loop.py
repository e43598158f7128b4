"""The context tower's engine loop. It alone touches the tower, the states and their memory, in a thread of its own.

receive what has come -> plan -> run -> deliver. States change hands while entries are received, that is between two
iterations and nowhere else: no plan can name a slot that another session has by the time it runs.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from opentelemetry.trace import Span, Tracer

from twotower.context.copies import CopyBuffers
from twotower.context.messages import (
    CloseSession,
    CommitBlocks,
    Committed,
    ContextEntry,
    ContextResult,
    CopySent,
    CopyState,
    OpenSession,
    PrefixHit,
    PrefixLoaded,
    PrefixWanted,
    ScoreTokens,
    SessionFailed,
    SetPaused,
    StateCopied,
    StateSoonReady,
    TokenDecoded,
    WorkerLeft,
)
from twotower.context.prefixes import CachedPrefix, PrefixCache
from twotower.context.resident import ContextResident
from twotower.engine.context_engine import ContextEngine, StatesLostError
from twotower.engine.inbox import Inbox
from twotower.engine.isolation import Isolation
from twotower.engine.pacing import Load, Outbound, Pacing
from twotower.engine.progress import Progress
from twotower.engine.scheduler import Plan, plan
from twotower.engine.scoring import PromptScorer, Scoring
from twotower.engine.waiting import WaitingLine
from twotower.errors import Overloaded, TwoTowerError, Unavailable
from twotower.model.pool import StatePool
from twotower.tracing.recorder import NO_TRACER
from twotower.wire.state import state_tensors

log = logging.getLogger(__name__)

FAILED = "the context tower failed on this request"
MAX_COPIES = 16
"""Copied states that may wait to be sent: each takes as much memory as a session."""


class ContextLoop:
    """Prompts, commits and AR tokens of all sessions of this replica."""

    def __init__(
        self,
        engine: ContextEngine,
        pool: StatePool,
        prefixes: PrefixCache,
        deliver: Callable[[Sequence[ContextResult]], object],
        *,
        chunk: int,
        budget: int,
        max_waiting: int,
        progress: Progress,
        pacing: Pacing | None = None,
        outbound: Outbound | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        """deliver: takes results, in this thread. chunk: prompt tokens of a session in a forward; budget: tokens of an
        iteration; max_waiting: sessions that may wait for state memory.
        """
        self._engine, self._pool, self._prefixes, self._take = engine, pool, prefixes, deliver
        self._chunk, self._budget, self._max_waiting = chunk, budget, max_waiting
        self._progress, self._pacing, self.tracer = progress, pacing or Pacing(), tracer
        self.inbox: Inbox[ContextEntry | None] = Inbox()
        """None ends the loop."""
        self.refining = 0
        """Sessions whose next block a denoiser writes; kept by `Sessions`."""
        self.times = engine.times
        """What AR steps and verifications take, measured here; `Sessions` adds the denoisers' forwards."""
        self.outbound = outbound or Outbound()
        self._waiting: WaitingLine[OpenSession | ScoreTokens] = WaitingLine()
        self._residents: dict[str, ContextResident] = {}
        self._isolation: Isolation[ContextResident] = Isolation("forward of the context tower", lambda resident: resident.name)
        self._ahead: Plan[ContextResident] = Plan()
        """What the next iteration would run; made anew whenever something has come or gone."""
        self._scorer = PromptScorer(engine.tower, chunk=chunk, budget=budget)
        self._copies = CopyBuffers(MAX_COPIES)
        self._stopped = False

    def run(self) -> None:
        """Until None is received. Raises what a forward raised when session after session fails alone."""
        try:
            while not self._stopped:
                self.iterate()
        finally:
            self._pacing.close()

    def iterate(self) -> None:
        """Receive, plan, run, deliver; or wait, where nothing is to be done yet."""
        patience = self._pacing.patience(self._load())
        if patience != 0:
            self._receive(patience)
            return
        self._pacing.begin()
        with self._progress.forward():
            self._receive(0)
            self._run(self._ahead)
            self._ahead = self._plan()
            self._receive(0)
        self._pacing.end(self._load())

    @property
    def waiting(self) -> int:
        """Sessions that wait for state memory."""
        return len(self._waiting)

    # receive

    def _receive(self, wait_s: float | None) -> None:
        entries = self.inbox.take(wait_s)
        for entry in entries:
            match entry:
                case None:
                    self._stopped = True
                case CopySent(copy):
                    self._copies.give_back(copy)
                case OpenSession() | ScoreTokens():
                    self._open(entry)
                case CloseSession(session_id):
                    self._close(session_id)
                case CommitBlocks(blocks):
                    for session_id, piece in blocks:
                        if (resident := self._residents.get(session_id)) is not None:
                            resident.session.blocks.append(piece)
                case _ if (resident := self._residents.get(entry.session_id)) is None:
                    pass  # it is over
                case CopyState(_, lease):
                    resident.copy_for = lease
                case WorkerLeft():
                    resident.held = False
                    resident.copy_for = None
                case SetPaused(_, paused):
                    resident.paused = paused
                case PrefixLoaded(_, chunks, snapshot):
                    resident.awaits_prefix = False
                    if snapshot is not None:
                        self._prefixes.restore(resident.session, resident.borders, CachedPrefix(chunks, snapshot))
        admitted = self._admit()
        self._copy_states()
        if entries or admitted:
            self._ahead = self._plan()

    def _open(self, entry: OpenSession | ScoreTokens) -> None:
        if len(self._waiting) >= self._max_waiting and (self._waiting or not self._fits(entry)):
            error = Overloaded(f"all state memory is taken, and {len(self._waiting)} sessions wait for it already")
            if isinstance(entry, ScoreTokens):
                entry.tell(error)
            else:
                self._deliver([SessionFailed(entry.session_id, error)])
        else:
            self._waiting.add(entry.session_id, entry, entry.priority)
            self._admit()

    def _close(self, session_id: str) -> None:
        self._waiting.leave(session_id)
        if (resident := self._residents.pop(session_id, None)) is not None:
            self._pool.release(resident.session.state)
        elif (state := self._scorer.leave(session_id)) is not None:
            self._pool.release(state)

    def _fits(self, entry: OpenSession | ScoreTokens) -> bool:
        return self._pool.fits(_room_of(entry))

    def _admit(self) -> bool:
        """Give memory to those who wait and fit; whether anybody did."""
        admitted = False
        for entry in self._waiting.admit(self._fits):
            admitted = True
            state = self._pool.acquire(_room_of(entry))
            if isinstance(entry, ScoreTokens):
                self._scorer.begin(Scoring(entry.session_id, entry.tokens, entry.top, state, entry.tell))
                continue
            session = self._engine.open(entry.session_id, entry.tokens, entry.params, entry.generated, state, entry.rounds)
            borders, hit = self._prefixes.begin(session)
            self._residents[session.id] = resident = ContextResident(session, borders)
            if hit is not None:
                self._deliver([PrefixHit(borders.links[: hit.chunks], hit.snapshot)])
            elif borders.links and self._prefixes.shared:
                resident.awaits_prefix = True
                self._deliver([PrefixWanted(session.id, borders.links)])
        return admitted

    def _copy_states(self) -> None:
        copied: list[ContextResult] = []
        for resident in list(self._residents.values()):
            if not self._copies.available:
                break
            if resident.copy_for is None or not resident.settled:
                continue
            state, lease = resident.session.state, resident.copy_for
            try:
                with torch.inference_mode():
                    copy = self._copies.copy(list(state_tensors(state, self._engine.decay_rates)))
            except Exception as error:  # out of memory: the session goes on where there is some
                log.error("the state of session %s could not be copied", resident.name, exc_info=error)
                self._end([(resident, error)])
                continue
            resident.copy_for = None
            resident.held = True
            copied.append(StateCopied(resident.name, lease, state.length, copy))
        self._deliver(copied)

    # plan

    def _plan(self) -> Plan[ContextResident]:
        return plan(self._residents.values(), budget=self._budget, chunk=self._chunk)

    def _load(self) -> Load:
        ahead = self._ahead
        prompts = ahead.prompts + len(self._scorer)
        return Load(len(ahead.commits), prompts, len(ahead.decodes), self.refining, len(self._residents))

    # run and deliver: a forward of each kind, and its results at once. A failure reaches those it concerns, and no one else.

    def _run(self, ahead: Plan[ContextResident]) -> None:
        by_size: dict[int, list[ContextResident]] = defaultdict(list)
        for resident in sorted(ahead.commits, key=lambda resident: resident.session.state.slot):
            by_size[len(resident.session.blocks[0].tokens)].append(resident)
        for residents in by_size.values():
            self._end(self._isolation.run(residents, self._commit))
        if ahead.decodes:
            self._decode(ahead.decodes)
        if ahead.chunks:
            self._read(ahead.chunks)
        for state in self._scorer.step():
            self._pool.release(state)
        self._copy_states()

    def _commit(self, residents: Sequence[ContextResident]) -> None:
        """A block of each, all of one size."""
        self._announce([resident for resident in residents if len(resident.session.blocks) == 1])
        sessions = [resident.session for resident in residents]
        began = time.perf_counter()
        try:
            with self._span("commit", batch=len(sessions)):
                deltas, rounds = self._engine.advance([(session, session.blocks[0]) for session in sessions])
        except StatesLostError as error:  # to run it again would take tokens into states that hold them already
            log.error("a commit of %d sessions failed, and their states are lost", len(sessions), exc_info=error)
            self._end([(resident, error) for resident in residents])
            return
        failed: list[ContextResult] = []
        for resident, round_ in zip(residents, rounds, strict=True):
            resident.session.blocks.popleft()
            if round_ is not None and round_.error is not None:
                failed.append(self._failed(resident, round_.error))
            elif round_ is not None:
                resident.session.emit(round_.tokens)
        if any(rounds):
            self.times.measured("commit", time.perf_counter() - began)
        committed = Committed([s.id for s in sessions], [s.state.length for s in sessions], deltas, rounds)
        self._deliver([*failed, committed])

    def _decode(self, residents: Sequence[ContextResident]) -> None:
        behind = [resident.session.pending is not None for resident in residents]
        began = time.perf_counter()
        try:
            with self._span("decode", batch=len(residents)):
                drawn = self._engine.decode([resident.session for resident in residents])
        except Exception as error:
            self._lost(residents, error)
            return
        self._isolation.clear()
        if all(behind):
            self.times.measured("token", time.perf_counter() - began)
        results: list[ContextResult] = []
        for resident, token, forwards in zip(residents, drawn, behind, strict=True):
            self._residents[resident.name] = self._residents.pop(resident.name)  # those who did not run are next
            resident.alone = resident.alone and len(residents) > 1
            if isinstance(token, int):
                resident.session.emit([token])
                results.append(TokenDecoded(resident.name, token, resident.session.logprobs, int(forwards)))
            else:
                results.append(self._failed(resident, token))
        self._deliver(results)

    def _read(self, chunks: Sequence[tuple[ContextResident, int]]) -> None:
        """A packed forward of prompts."""
        self._announce([r for r, tokens in chunks if tokens == r.prefill_left and not r.session.blocks])
        tokens = sum(count for _, count in chunks)
        try:
            with self._span("prefill", tokens=tokens, batch=len(chunks)):
                self._engine.read([(resident.session, count) for resident, count in chunks])
        except Exception as error:
            self._lost([resident for resident, _ in chunks], error)
            return
        self._isolation.clear()
        for resident, _ in chunks:
            resident.alone = resident.alone and resident.session.prefill_left > 0
            try:
                self._prefixes.keep(resident.session, resident.borders)
            except Exception as error:  # out of memory: the state is not kept, and that is all
                log.warning("a state could not be kept in the prefix cache: %s", error)

    def _lost(self, residents: Sequence[ContextResident], error: Exception) -> None:
        """A forward that changes states as it goes has failed: each session begins again, alone; failing alone, it ends."""
        if len(residents) == 1:
            self._isolation.blame(residents[0], error)
            self._end([(residents[0], error)])
            return
        log.warning("a forward over %d sessions failed; each begins again, alone: %s", len(residents), error)
        for resident in residents:
            resident.alone = True
            self._engine.restart(resident.session)

    def _announce(self, settling: Sequence[ContextResident]) -> None:
        first = [resident for resident in settling if not resident.announced]
        for resident in first:
            resident.announced = True
        self._deliver([StateSoonReady(resident.name) for resident in first])

    def _end(self, failed: Sequence[tuple[ContextResident, Exception]]) -> None:
        self._deliver([self._failed(resident, Unavailable(FAILED)) for resident, _ in failed])

    def _failed(self, resident: ContextResident, error: TwoTowerError) -> SessionFailed:
        self._close(resident.name)
        return SessionFailed(resident.name, error)

    def _deliver(self, results: Sequence[ContextResult]) -> None:
        if results:
            self.outbound.delivered += 1
            self._take(results)

    def _span(self, name: str, **attributes: int) -> AbstractContextManager[Span]:
        return self.tracer.start_as_current_span(name, attributes=attributes)


def _room_of(entry: OpenSession | ScoreTokens) -> int:
    """Tokens that its state must have room for."""
    return len(entry.tokens) if isinstance(entry, ScoreTokens) else ContextResident.room_of(entry)
