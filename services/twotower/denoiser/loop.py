"""The denoiser's engine loop. It alone touches the tower, the states and their memory, in a thread of its own.

receive what has come -> plan -> run -> deliver. Sessions join and leave while entries are received, that is between two
forwards and nowhere else.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence

from opentelemetry.trace import Tracer
from torch import Tensor

from twotower.denoiser.messages import (
    Begin,
    BlocksFinished,
    BlocksShown,
    DenoiserEntry,
    DenoiserResult,
    Extend,
    Held,
    Leave,
    SessionsFailed,
    SlotsFree,
    TensorsRead,
)
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.inbox import Inbox
from twotower.engine.isolation import Isolation
from twotower.engine.pacing import Load, Pacing
from twotower.engine.progress import Progress
from twotower.engine.refinement import Refinement
from twotower.errors import Incompatible
from twotower.model.delta_batch import apply_batch
from twotower.model.pool import StatePool
from twotower.model.state import ContextState
from twotower.request import BlockStep, GenerationParams
from twotower.tracing.recorder import NO_TRACER
from twotower.wire.state import delta_from, fill_state

log = logging.getLogger(__name__)


class DenoiserResident:
    """A session that has a slot here."""

    def __init__(self, begin: Begin, state: ContextState, rates: Mapping[int, Tensor], block: Refinement) -> None:
        self.held, self.context, self.room = begin.held, begin.context, begin.room
        self.params: GenerationParams = begin.params
        self.state = state
        self.rates = rates
        """The context tower's decay rates, with which deltas are applied."""
        self.block: Refinement | None = block
        """Under way; None: it is handed in, and its delta has not come."""


class DenoiserLoop:
    """One forward after the other, for whatever blocks are under way."""

    def __init__(
        self,
        engine: DenoiserEngine,
        pool: StatePool,
        deliver: Callable[[Sequence[DenoiserResult]], object],
        *,
        progress: Progress,
        pacing: Pacing | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        """deliver: takes results, in this thread."""
        self.engine, self._pool, self._deliver = engine, pool, deliver
        self._progress, self._pacing, self.tracer = progress, pacing or Pacing(), tracer
        self.inbox: Inbox[DenoiserEntry | None] = Inbox()
        """None ends the loop."""
        self._residents: dict[Held, DenoiserResident] = {}
        self._waiting: deque[Begin] = deque()
        """States that have come, for which there is no room yet."""
        self._extensions: list[Extend] = []
        self._rates: Mapping[int, Tensor] = {}
        self._isolation: Isolation[DenoiserResident] = Isolation("forward of the denoiser", lambda r: r.held.session_id)
        self._stopped = False

    def run(self) -> None:
        """Until None is received. Raises what a forward raised when session after session fails alone."""
        try:
            while not self._stopped:
                self.iterate()
        finally:
            self._pacing.close()

    def iterate(self) -> None:
        """Receive, run, deliver; or wait, where nothing is to be done yet."""
        patience = self._pacing.patience(self._load())
        if patience != 0:
            self._receive(patience)
            return
        self._pacing.begin()
        with self._progress.forward():
            self._receive(0)
            self._run()
        self._pacing.end(self._load())

    # receive

    def _receive(self, wait_s: float | None) -> None:
        for entry in self.inbox.take(wait_s):
            match entry:
                case None:
                    self._stopped = True
                case Begin():
                    self._waiting.append(entry)
                case Extend():
                    self._extensions.append(entry)
                case Leave(held):
                    self._leave(held)

    def _leave(self, leaving: Sequence[Held]) -> None:
        for begin in [begin for begin in self._waiting if begin.held in leaving]:
            self._waiting.remove(begin)
            self._deliver([TensorsRead(begin.state)])
        for held in leaving:
            self._release(held)
        self._deliver([SlotsFree(leaving)])

    def _release(self, held: Held) -> None:
        if (resident := self._residents.pop(held, None)) is not None:
            self._pool.release(resident.state)

    # plan

    def _load(self) -> Load:
        blocks = sum(resident.block is not None for resident in self._residents.values())
        coming = bool(self._extensions) or bool(self._waiting and self._pool.fits(self._waiting[0].room))
        return Load(others=blocks + coming)

    # run and deliver. A failure reaches those it concerns, and no one else.

    def _run(self) -> None:
        extensions, self._extensions = self._extensions, []
        for extend in extensions:
            self._extend(extend)
        while self._waiting and self._pool.fits(self._waiting[0].room):
            self._begin(self._waiting.popleft())
        by_size: dict[int, list[DenoiserResident]] = defaultdict(list)
        for resident in sorted(self._residents.values(), key=lambda resident: resident.state.slot):
            if resident.block is not None:
                by_size[resident.params.block_size].append(resident)
        for residents in by_size.values():
            self._fail(self._isolation.run(residents, self._step))
            self._hand_in(residents)

    def _begin(self, begin: Begin) -> None:
        """Give a session a slot, and put its state there."""
        state = self._pool.acquire(begin.room)
        self._rates = _same_if_equal(self._rates, fill_state(state, begin.state.tensors, begin.length))
        block = self.engine.start(begin.params, state, begin.generated, *(begin.draft or ()))
        self._residents[begin.held] = DenoiserResident(begin, state, self._rates, block)
        self._deliver([TensorsRead(begin.state)])

    def _extend(self, extend: Extend) -> None:
        """Apply a commit to the states of those who are still here."""
        here = [(row, r) for row, meta in enumerate(extend.rows) if (r := self._residents.get(meta.held)) is not None]
        try:
            if here:
                deltas = delta_from(extend.deltas.tensors, self.engine.tower.config, extend.block_size)
                if any(row.kept != extend.block_size for row in extend.rows):
                    deltas = dataclasses.replace(deltas, counts=tuple(row.kept for row in extend.rows))
                with self.tracer.start_as_current_span("apply", attributes={"batch": len(here)}):
                    mine = deltas.select([row for row, _ in here])
                    apply_batch([r.state for _, r in here], mine, here[0][1].rates, self.engine.tower.kernels)
        except Exception as error:  # the states are lost: which layers have taken it is not known
            log.error("a commit could not be applied to %d sessions", len(here), exc_info=error)
            self._fail([(resident, error) for _, resident in here])
            return
        finally:
            self._deliver([TensorsRead(extend.deltas)])
        for row, resident in here:
            length, generated, draft = extend.rows[row].length, extend.rows[row].generated, extend.rows[row].draft
            if resident.state.length != length:
                wrong = Incompatible(f"committed.length: {length}, the state here has {resident.state.length}")
                self._fail([(resident, wrong)])
            else:
                resident.block = self.engine.start(resident.params, resident.state, generated, *(draft or ()))

    def _step(self, residents: Sequence[DenoiserResident]) -> None:
        blocks = [resident.block for resident in residents if resident.block is not None]
        began = time.perf_counter()
        with self.tracer.start_as_current_span("step", attributes={"batch": len(residents)}):
            self.engine.step(blocks)
        for block in blocks:
            block.seconds += time.perf_counter() - began

    def _hand_in(self, worked: Sequence[DenoiserResident]) -> None:
        """What a forward finished: one message for each context, and one before it of what its clients want to see."""
        self._show(worked)
        finished: dict[str, list[tuple[Held, Refinement]]] = defaultdict(list)
        for resident in worked:
            block = resident.block
            if block is None or not block.done or resident.held not in self._residents:
                continue
            if block.error is not None:
                self._fail([(resident, block.error)])
            else:
                finished[resident.context].append((resident.held, block))
                resident.block = None
        self._deliver([BlocksFinished(context, blocks) for context, blocks in finished.items()])

    def _show(self, worked: Sequence[DenoiserResident]) -> None:
        shown: dict[str, list[tuple[Held, int, BlockStep]]] = defaultdict(list)
        for resident in worked:
            block = resident.block
            if block is not None and block.step is not None and block.error is None and resident.held in self._residents:
                shown[resident.context].append((resident.held, block.generated, block.step))
        self._deliver([BlocksShown(context, blocks) for context, blocks in shown.items()])

    def _fail(self, failed: Sequence[tuple[DenoiserResident, Exception]]) -> None:
        for resident, _ in failed:
            self._release(resident.held)
        if failed:
            self._deliver([SessionsFailed([(resident.held, error) for resident, error in failed])])


def _same_if_equal(known: Mapping[int, Tensor], rates: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
    """The known decay rates where they are the same, as contexts of one checkpoint have: a commit's rows share operations."""
    if rates.keys() == known.keys() and all(rate.equal(known[layer]) for layer, rate in rates.items()):
        return known
    return {layer: rate.clone() for layer, rate in rates.items()}
