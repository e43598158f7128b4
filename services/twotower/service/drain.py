"""A drain: asked for by SIGTERM or by an order, reported when nothing is left, and possibly called off."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


class Drain:
    """The one place where a service begins to drain, goes on serving after all, or says that it is drained.

    Used in the event loop only.
    """

    def __init__(
        self,
        *,
        begin: Callable[[], object],
        call_off: Callable[[], object],
        load: Callable[[], int],
        set_serving: Callable[[bool], Awaitable[None]],
        say: Callable[[str], object] = lambda line: print(line, flush=True),
    ) -> None:
        """begin: take no more work; call_off: take it again; load: what is left; set_serving: readiness; say: prints a line."""
        self._begin, self._call_off, self._load, self._set_serving, self._say = begin, call_off, load, set_serving, say
        self._reported = False
        self._ending = False
        self.draining = False

    async def begin(self) -> None:
        """Drain, and end then: nobody calls this one off."""
        self._ending = True
        await self._drain()

    async def obey(self, order: bool | None) -> None:
        """Drain (True), or go on serving (False); None: as before. Called once a second, so that `drained` is noticed."""
        if order is True:
            await self._drain()
        elif order is False and self.draining and not self._ending:
            self.draining = self._reported = False
            self._call_off()
            await self._set_serving(True)
            log.info("the drain was called off: serving again")
            self._say("serving")
        await self.report()

    async def report(self) -> None:
        """Say `drained` once nothing is left."""
        if self.draining and not self._reported and self._load() == 0:
            self._reported = True
            self._say("drained")

    async def _drain(self) -> None:
        if self.draining:
            return
        self.draining = True
        self._begin()  # first: who looks at readiness must not find work accepted after it
        await self._set_serving(False)
        log.info("draining: %d left", self._load())
