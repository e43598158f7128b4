"""The gRPC server that every service runs: health, reflection, limits, and our errors as statuses."""

from __future__ import annotations

from collections.abc import Sequence

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from twotower.errors import PortInUse, ServiceFailed
from twotower.rpc.address import check_port, join_address
from twotower.rpc.aio_server import make_server
from twotower.rpc.channel import MAX_MESSAGE_BYTES, ChannelOptions, keepalive
from twotower.rpc.health import HealthServicer
from twotower.rpc.interceptor import ErrorInterceptor
from twotower.rpc.limits import CallLimits
from twotower.rpc.logs import quiet_grpc_log
from twotower.rpc.self_check import end_soon, watch_port

SERVER_OPTIONS: ChannelOptions = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # two services on one port must be an error, not share its connections
    # Peers ping every few seconds while a call is open (see channel.py); that is no abuse.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    *keepalive(10_000, 10_000),
    ("grpc.server_handshake_timeout_ms", 10_000),  # for a connection's first bytes
)


LIVENESS = "liveness"
"""What health checks name to ask whether the process works at all: SERVING as long as anything is answered, also by a tower
that drains or a gateway that finds nobody, which must not be killed for it."""


class RpcServer:
    """A gRPC server on one address. Add servicers to `.server`, then `start`.

    `option`: the setting that names the port, for the error when the port is taken.
    `max_calls`: the most open calls; one more is refused as overloaded. `max_streams`: the most calls of one connection;
    the client's library holds back further ones. `max_message_bytes`: the largest message that is received.
    Must be made inside a running event loop.
    """

    def __init__(
        self,
        host: str,
        port: int,
        option: str = "--port",
        *,
        max_calls: int = 4096,
        max_streams: int = 4096,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        quiet_grpc_log()
        limits = (("grpc.max_receive_message_length", max_message_bytes), ("grpc.max_concurrent_streams", max_streams))
        self.server = make_server([ErrorInterceptor(CallLimits(max_calls))], (*SERVER_OPTIONS, *limits))
        self._host = host
        self._port = port
        self._option = option
        self._services: tuple[str, ...] = ()
        self._dead = False
        """Whether the port was given up (see `watch`)."""
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)

    @property
    def address(self) -> str:
        """The `host:port` it listens on; once started, with the real port."""
        return join_address(self._host, self._port)

    async def start(self, service_names: Sequence[str]) -> None:
        """Bind and listen; health reports NOT_SERVING until `set_serving(True)`. Raises PortInUse."""
        self._services = tuple(service_names)
        reflection.enable_server_reflection(
            (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME),
            self.server,
        )
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        await self.set_serving(False)
        check_port(self._host, self._port, self._option)  # gRPC's own message does not give the reason
        try:
            self._port = self.server.add_insecure_port(self.address)
        except RuntimeError:
            raise PortInUse(f"cannot listen on {self.address} ({self._option}): it is taken") from None
        await self.server.start()

    async def set_serving(self, serving: bool) -> None:
        """Set the answer of `grpc.health.v1`, for the server as a whole and for each service."""
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if serving else statuses.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)

    async def watch(self) -> None:
        """Dial the server's own port every second, until cancelled. Raises ServiceFailed when it no longer answers: the process
        must then end, so that its supervisor can restart it, and does so within seconds, whatever it waits for."""
        try:
            await watch_port(self._host, self._port)
        except ServiceFailed:
            self._dead = True
            end_soon()
            raise

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, wait for running ones up to `grace_s`, cancel the rest."""
        await self.set_serving(False)
        if not self._dead:  # stopping a server whose loop died would crash
            await self.server.stop(grace_s)
