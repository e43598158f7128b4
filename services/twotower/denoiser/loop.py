"""The denoiser's engine loop: one forward after the other, for whatever blocks are under way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from opentelemetry.trace import Tracer
from torch import Tensor

from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.refinement import Refinement
from twotower.engine.thread import EngineThread
from twotower.errors import TwoTowerError
from twotower.model.state import ContextState, Delta
from twotower.tracing.recorder import NO_TRACER

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Forwards in a row that may fail."""


class DenoiserLoop:
    """Blocks join and leave between forwards. Nothing else touches the engine."""

    def __init__(self, engine: DenoiserEngine, thread: EngineThread, tracer: Tracer = NO_TRACER) -> None:
        self.engine = engine
        self._thread = thread
        self._tracer = tracer
        self._blocks: dict[Refinement, asyncio.Future[None]] = {}
        self._wake = asyncio.Event()

    async def refine(self, block: Refinement) -> None:
        """Until the block is done. Cancelling it frees its place before the next forward. Raises NonFiniteLogits."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._blocks[block] = done
        self._wake.set()
        try:
            await done
        finally:
            self._blocks.pop(block, None)

    async def apply(self, state: ContextState, delta: Delta, rates: Mapping[int, Tensor]) -> None:
        """Extend a state by a committed block, between forwards."""

        def work() -> None:
            with self._tracer.start_as_current_span("apply"):
                state.apply(delta, rates)

        await self._thread.run(work)

    async def settle(self) -> None:
        """Until the forward under way, if any, is over: what it computes with may then be given to others."""
        await self._thread.settle()

    async def run(self) -> None:
        """Until cancelled, or until forwards fail again and again: then the device is broken, and so is this process."""
        failures = 0
        while True:
            await self._wake.wait()
            blocks = list(self._blocks)
            if not blocks:
                self._wake.clear()
                continue
            try:
                await self._thread.run(self._step, blocks)
            except Exception as error:
                log.error("a forward of the denoiser failed", exc_info=error)
                self._finish(blocks, TwoTowerError("the denoiser failed on this request"))
                failures += 1
                if failures == MAX_FAILURES:
                    raise
                continue
            failures = 0
            self._finish([block for block in blocks if block.done], None)

    def _step(self, blocks: list[Refinement]) -> None:
        with self._tracer.start_as_current_span("step", attributes={"batch": len(blocks)}):
            self.engine.step(blocks)

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
