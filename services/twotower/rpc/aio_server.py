"""grpc.aio's server, with an accept loop that no client's data can end.

Since grpcio 1.84 that loop itself decodes the path of every call whose method is not registered, so that a path that is not
UTF-8 ends the loop, and with it the port, for good. Here calls of unknown methods are answered beside the loop, which
never sees them. This relies on grpcio's internals; where they differ (before 1.84, which decodes each path within its
own call and needs no guard), grpcio's server is used as it is. `self_check.py` watches over both.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, cast

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server as aio

from twotower.rpc.channel import ChannelOptions

log = logging.getLogger(__name__)

GUARDED = hasattr(cygrpc.AioServer, "_make_request_call_future")
"""Whether this grpcio needs the guard."""


def make_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor],  # type: ignore[type-arg]  # generic in the stubs only
    options: ChannelOptions,
) -> grpc.aio.Server:
    """As `grpc.aio.server`. Services must register their methods, as generated code does; generic handlers are ignored."""
    if not GUARDED:
        return grpc.aio.server(interceptors=interceptors, options=options)
    return cast(grpc.aio.Server, _GuardedServer(interceptors, options))


class _GuardedServer(aio.Server):
    """grpc.aio.Server over our own core."""

    def __init__(self, interceptors: Sequence[Any], options: ChannelOptions) -> None:
        self._loop = cygrpc.get_working_loop()
        arguments = aio._augment_channel_arguments(options, None)
        self._server = _GuardedCore(self._loop, None, (), interceptors, arguments, None)


class _NoMethods:
    """A handler that knows no method."""

    def resolve_handler(self, details: Any) -> None:
        return None


class _GuardedCore(cygrpc.AioServer):  # type: ignore[misc]
    """Calls of methods that are not registered never reach the accept loop."""

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        if method is not None:
            future: asyncio.Future[Any] = super()._make_request_call_future(method)
            return future
        return asyncio.get_running_loop().create_task(self._refuse_unknown())

    async def _refuse_unknown(self) -> None:
        """Answer each with UNIMPLEMENTED until the server stops; ends like grpcio's own wait for a call."""
        refusals: set[asyncio.Task[None]] = set()
        while True:
            refusal = asyncio.create_task(_refuse(await self._request_call()))
            refusals.add(refusal)
            refusal.add_done_callback(refusals.discard)


async def _refuse(call: Any) -> None:
    name, loop = "an unknown method", asyncio.get_running_loop()
    try:
        answer = cygrpc._handle_rpc(name, _NoMethods(), (), call, loop, False)
        await cygrpc._schedule_rpc_coro(answer, call, loop, name)
    except Exception as error:  # dropping the call cancels it
        log.debug("a call of an unknown method could not be answered: %r", error)
