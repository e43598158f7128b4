"""The gRPC server every service runs: health, reflection, limits, and our errors as statuses."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from twotower.errors import PortInUse, ServiceFailed, TwoTowerError
from twotower.rpc.address import check_port, join_address
from twotower.rpc.aio_server import make_server
from twotower.rpc.channel import SIZE_OPTIONS, ChannelOptions
from twotower.rpc.errors import MAX_DETAILS, error_metadata
from twotower.rpc.logs import quiet_grpc_log
from twotower.rpc.self_check import end_soon, watch_port
from twotower.status import status_of

log = logging.getLogger(__name__)

SERVER_OPTIONS: ChannelOptions = (
    *SIZE_OPTIONS,
    ("grpc.so_reuseport", 0),  # two services on one port must be an error, not a lottery
    # Peers ping every few seconds while a call is open (see channel.py); that is no abuse.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class RpcServer:
    """A gRPC server on one address. Add servicers to `.server`, then `start`.

    `option`: the setting that names the port, for the error when it is taken.
    Must be made inside a running event loop.
    """

    def __init__(self, host: str, port: int, option: str = "--port") -> None:
        quiet_grpc_log()
        self.server = make_server([_ErrorInterceptor()], SERVER_OPTIONS)
        self._host = host
        self._port = port
        self._option = option
        self._services: tuple[str, ...] = ()
        self._dead = False
        """The port was given up (see `watch`)."""
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # absent from the stubs
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)

    @property
    def address(self) -> str:
        """`host:port` that is listened on; the port is the real one once started."""
        return join_address(self._host, self._port)

    async def start(self, service_names: Sequence[str]) -> None:
        """Bind and listen; health says NOT_SERVING until `set_serving(True)`. Raises PortInUse."""
        self._services = tuple(service_names)
        reflection.enable_server_reflection(
            (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME),
            self.server,
        )
        await self.set_serving(False)
        check_port(self._host, self._port, self._option)  # gRPC's own message does not say why
        try:
            self._port = self.server.add_insecure_port(self.address)
        except RuntimeError:
            raise PortInUse(f"cannot listen on {self.address} ({self._option}): it is taken") from None
        await self.server.start()

    async def set_serving(self, serving: bool) -> None:
        """What `grpc.health.v1` answers, for the server as a whole and for each service."""
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if serving else statuses.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)

    async def watch(self) -> None:
        """Dial the own port every second, until cancelled. When it no longer answers, raise ServiceFailed: the process must
        end, for its supervisor to start it again, and does so within seconds, whatever holds it up."""
        try:
            await watch_port(self._host, self._port)
        except ServiceFailed:
            self._dead = True
            end_soon()
            raise

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, wait for running ones up to `grace_s`, cancel the rest."""
        await self.set_serving(False)
        if not self._dead:  # what is left of a server whose loop died crashes when it is stopped
            await self.server.stop(grace_s)


Behavior = Callable[[Any, Any], Any]


class _ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Ends a call that raised with the status of status.py; what is not ours is logged and told as "internal error"."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None
        make, kind = _HANDLER_KINDS[handler.request_streaming, handler.response_streaming]
        wrapped = _wrap(getattr(handler, kind), handler_call_details.method)
        return make(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


_HANDLER_KINDS: dict[tuple[bool, bool], tuple[Callable[..., Any], str]] = {
    (False, False): (grpc.unary_unary_rpc_method_handler, "unary_unary"),
    (False, True): (grpc.unary_stream_rpc_method_handler, "unary_stream"),
    (True, False): (grpc.stream_unary_rpc_method_handler, "stream_unary"),
    (True, True): (grpc.stream_stream_rpc_method_handler, "stream_stream"),
}


def _wrap(behavior: Behavior, method: str) -> Behavior:
    """`behavior`, an async function or async generator, with its errors turned into statuses.

    A plain function (reflection's sync servicer) is left as it is.
    """
    if inspect.isasyncgenfunction(behavior):

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            responses = behavior(request, context)
            try:
                async for response in responses:
                    yield response
            except Exception as error:
                await _abort(error, context, method)
            finally:
                await responses.aclose()  # a cancelled call ends its generator now, not when it is collected

        return generate
    if inspect.iscoroutinefunction(behavior):

        async def call(request: Any, context: Any) -> Any:
            try:
                return await behavior(request, context)
            except Exception as error:
                await _abort(error, context, method)

        return call
    return behavior


async def _abort(error: Exception, context: Any, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):  # the servicer chose its status itself
        raise error
    if isinstance(error, TwoTowerError):
        await context.abort(status_of(error).grpc, str(error)[:MAX_DETAILS], error_metadata(error))
    log.error("%s failed", method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error", error_metadata(TwoTowerError()))
