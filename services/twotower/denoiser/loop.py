"""The denoiser's engine loop: one forward after the other, for whatever blocks are under way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from opentelemetry.trace import Tracer
from torch import Tensor

from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.refinement import Refinement
from twotower.engine.thread import EngineThread
from twotower.errors import TwoTowerError
from twotower.model.state import ContextState, Delta
from twotower.tracing.recorder import NO_TRACER

log = logging.getLogger(__name__)

JOIN_TURNS = 3
"""Turns of the event loop from an applied delta to the next block's place in the batch."""
MAX_FAILURES = 3
"""Forwards in a row that may fail."""


class DenoiserLoop:
    """Blocks join and leave between forwards. Nothing else touches the engine."""

    def __init__(self, engine: DenoiserEngine, thread: EngineThread, tracer: Tracer = NO_TRACER) -> None:
        self.engine = engine
        self._thread = thread
        self.tracer = tracer
        self._blocks: dict[Refinement, asyncio.Future[None]] = {}
        self._applies: dict[asyncio.Future[None], Callable[[], None]] = {}
        self._wake = asyncio.Event()
        self._interrupted = False
        """Read between forwards by the engine's thread, which else goes on with the same blocks."""

    async def refine(self, block: Refinement) -> None:
        """Until the block is done. Cancelling it frees its place before the next forward. Raises NonFiniteLogits."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._blocks[block] = done
        self._interrupt()
        try:
            await done
        finally:
            if self._blocks.pop(block, None) is not None:
                self._interrupted = True

    async def apply(self, state: ContextState, delta: Delta, rates: Mapping[int, Tensor]) -> None:
        """Extend a state by a committed block, before the next forward."""

        def work() -> None:
            with self.tracer.start_as_current_span("apply"):
                state.apply(delta, rates, self.engine.tower.kernels)

        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._applies[done] = work
        self._interrupt()
        try:
            await done
        finally:
            self._applies.pop(done, None)

    async def settle(self) -> None:
        """Until the forward under way, if any, is over: what it computes with may then be given to others."""
        self._interrupted = True
        await self._thread.settle()

    def _interrupt(self) -> None:
        self._interrupted = True
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled, or until forwards fail again and again: then the device is broken, and so is this process."""
        failures = 0
        while True:
            await self._wake.wait()
            if self._applies:
                await self._apply()
            blocks = list(self._blocks)
            if not blocks:
                if not self._applies:
                    self._wake.clear()
                continue
            self._interrupted = False
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

    async def _apply(self) -> None:
        """Every delta that has come. Their sessions' next blocks then join the forward that follows."""
        applies = dict(self._applies)
        for done, error in await self._thread.run(_try_all, applies):
            if done.done():  # its session went away meanwhile
                continue
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(None)
        for _ in range(JOIN_TURNS):
            await asyncio.sleep(0)

    def _steps(self, blocks: list[Refinement]) -> None:
        """On the engine's thread: forwards of the same blocks, until one is done or something else waits."""
        while True:
            with self.tracer.start_as_current_span("step", attributes={"batch": len(blocks)}):
                self.engine.step(blocks)
            if self._interrupted or any(block.done for block in blocks):
                return

    def _finish(self, blocks: list[Refinement], error: Exception | None) -> None:
        for block in blocks:
            future = self._blocks.pop(block, None)
            if future is None or future.done():  # its session went away meanwhile
                continue
            failure = error or block.error
            if failure is not None:
                future.set_exception(failure)
            else:
                future.set_result(None)


def _try_all(works: Mapping[asyncio.Future[None], Callable[[], None]]) -> list[tuple[asyncio.Future[None], Exception | None]]:
    """Do all of it; with the error of what failed."""
    outcomes: list[tuple[asyncio.Future[None], Exception | None]] = []
    for done, work in works.items():
        try:
            work()
        except Exception as error:
            outcomes.append((done, error))
        else:
            outcomes.append((done, None))
    return outcomes
