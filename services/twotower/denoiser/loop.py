"""The denoiser's engine loop: one forward after the other, for whatever blocks are under way."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from opentelemetry.trace import Tracer
from torch import Tensor

from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.gathering import Gathering
from twotower.engine.refinement import Refinement
from twotower.engine.thread import EngineThread
from twotower.engine.turns import Turns
from twotower.errors import TwoTowerError
from twotower.model.state import ContextState, Extension, apply_all
from twotower.tracing.recorder import NO_TRACER

log = logging.getLogger(__name__)

GATHER_S = 0.02
"""How long a forward on shared cores waits, at most, for sessions that are on their way."""
JOIN_PASSES = 4
"""Passes of the event loop from an applied delta to the next block's place in the batch."""
MAX_FAILURES = 3
"""Forwards in a row that may fail."""


class Finish(NamedTuple):
    """How a block was finished."""

    forward: int
    """In which of this worker's forwards."""
    together: int
    """Blocks of the same context's sessions that were finished in it."""


class _Place(NamedTuple):
    """A block's place in the batch."""

    done: asyncio.Future[Finish]
    context: str
    """The address of its session's context."""


class DenoiserLoop:
    """Blocks join and leave between forwards. Nothing else touches the engine."""

    def __init__(
        self, engine: DenoiserEngine, thread: EngineThread, tracer: Tracer = NO_TRACER, turns: Turns | None = None
    ) -> None:
        """turns: on cores shared with other towers."""
        self.engine = engine
        self._thread = thread
        self.tracer = tracer
        self._turns = turns or Turns(None)
        self._forwards = 0
        self._blocks: dict[Refinement, _Place] = {}
        self._applies: dict[asyncio.Future[None], Extension] = {}
        self._rates: Mapping[int, Tensor] = {}
        self._coming = Gathering(GATHER_S)
        """Sessions whose states are on their way, and by context and commit, deltas of one commit."""
        self._wake = asyncio.Event()
        self._interrupted = False
        """Read between forwards by the engine's thread, which else goes on with the same blocks."""
        self._settling = 0
        """How many wait for the engine's thread; it must not wait for a turn meanwhile."""

    def expect(self, state: ContextState) -> None:
        """A session attaches: its state is on its way."""
        self._coming.expect(state)

    def known_rates(self, rates: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """The same object for equal decay rates: contexts of one checkpoint have the same; sessions share operations."""
        known = self._rates
        if rates.keys() != known.keys() or not all(rate.equal(known[layer]) for layer, rate in rates.items()):
            self._rates = {layer: rate.clone() for layer, rate in rates.items()}
        return self._rates

    def forget(self, state: ContextState) -> None:
        """Its session has left."""
        self._coming.forget(state)

    async def refine(self, block: Refinement, context: str = "") -> Finish:
        """Until the block is done. Cancelling it frees its place before the next forward. Raises NonFiniteLogits.

        context: address of the session's context.
        """
        done: asyncio.Future[Finish] = asyncio.get_running_loop().create_future()
        self._blocks[block] = _Place(done, context)
        self._coming.arrive(block.state)
        self._interrupt()
        try:
            return await done
        finally:
            if self._blocks.pop(block, None) is not None:
                self._interrupted = True

    async def apply(self, extension: Extension, commit: tuple[str, int], together: int) -> None:
        """Extend a state by a committed block, before the next forward.

        commit: of which context, and its number; together: how many sessions here are to be extended by it.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._applies[done] = extension
        if self._turns.shared:
            self._coming.arrive(commit, together)
        self._interrupt()
        try:
            await done
        finally:
            self._applies.pop(done, None)

    async def settle(self) -> None:
        """Until the forward under way, if any, is over: what it computes with may then be given to others."""
        self._interrupted = True
        self._settling += 1
        try:
            await self._thread.settle()
        finally:
            self._settling -= 1

    def _interrupt(self) -> None:
        self._interrupted = True
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled, or until forwards fail again and again: then the device is broken, and so is this process."""
        failures = 0
        try:
            while True:
                await self._wake.wait()
                if not self._blocks and not self._applies:
                    self._turns.give()
                    self._wake.clear()
                    continue
                if self._turns.shared:
                    if not await self._thread.run(self._take_turn):
                        continue
                    await self._coming.complete()  # no context of this machine computes now: what they made is under way
                if self._applies:
                    await self._apply()
                blocks = list(self._blocks)
                if not blocks:
                    continue
                self._interrupted = bool(self._applies)
                try:
                    await self._thread.run(self._steps, blocks)
                except Exception as error:
                    log.error("a forward of the denoiser failed", exc_info=error)
                    self._finish(blocks, TwoTowerError("the denoiser failed on this request"))
                    failures += 1
                    if failures == MAX_FAILURES:
                        raise
                    continue
                failures = 0
                self._finish([block for block in blocks if block.done], None)
        finally:
            self._turns.give()

    async def _apply(self) -> None:
        """Every delta that has come."""
        applies = dict(self._applies)
        self._applies.clear()
        error: Exception | None = None
        try:
            await self._thread.run(self._extend, list(applies.values()))
        except Exception as failure:
            log.error("deltas could not be applied", exc_info=failure)
            error = TwoTowerError("the denoiser failed on this request")
        for done in applies:
            if done.done():  # its session went away meanwhile
                continue
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(None)
        for _ in range(JOIN_PASSES):
            await asyncio.sleep(0)

    def _extend(self, extensions: list[Extension]) -> None:
        with self.tracer.start_as_current_span("apply", attributes={"batch": len(extensions)}):
            apply_all(extensions, self.engine.tower.kernels)

    def _steps(self, blocks: list[Refinement]) -> None:
        """On the engine's thread: forwards of the same blocks, until one is done or something else waits."""
        while True:
            self._forwards += 1
            with self.tracer.start_as_current_span("step", attributes={"batch": len(blocks)}):
                self.engine.step(blocks)
            self._turns.give()
            if any(block.done for block in blocks):
                return
            if not self._take_turn() or self._interrupted:
                return

    def _take_turn(self) -> bool:
        """On the engine's thread: False if someone waits for it to settle before there is a turn."""
        return self._turns.take(unless=lambda: self._settling > 0)

    def _finish(self, blocks: list[Refinement], error: Exception | None) -> None:
        places = {block: place for block in blocks if (place := self._blocks.pop(block, None)) is not None}
        present = {block: place for block, place in places.items() if not place.done.done()}  # others' sessions went away
        together = Counter(place.context for block, place in present.items() if (error or block.error) is None)
        for block, (done, context) in present.items():
            failure = error or block.error
            if failure is not None:
                done.set_exception(failure)
            else:
                done.set_result(Finish(self._forwards, together[context]))
