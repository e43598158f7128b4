"""Bytes that no client library sends: the port must outlive them."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.http2 import call, grpc_headers
from twotower.rpc.channel import open_channel
from twotower.rpc.server import RpcServer

CHECK = b"/grpc.health.v1.Health/Check"

BAD = {
    "path": grpc_headers(b"/twotower.v1.Inference/\xe4\xff"),
    "path of nothing": grpc_headers(b"\xff"),
    "service": grpc_headers(b"/\xff\xfe/Check"),
    "authority": grpc_headers(CHECK, authority=b"\xe4\xff"),
    "metadata": grpc_headers(CHECK, (b"x-name", b"\xe4\xff")),
    "metadata's key": grpc_headers(CHECK, (b"x-\xe4\xff", b"a")),
    "binary metadata": grpc_headers(CHECK, (b"x-name-bin", b"\xe4\xff")),
    "encoding": grpc_headers(CHECK, (b"grpc-encoding", b"\xe4\xff")),
    "timeout": grpc_headers(CHECK, (b"grpc-timeout", b"\xe4\xff")),
    "user agent": grpc_headers(CHECK, (b"user-agent", b"\xe4\xff")),
    "unknown path": grpc_headers(CHECK, (b"x-name", b"\xe4\xff")),
}


@pytest.mark.parametrize("headers", BAD.values(), ids=BAD)
async def test_a_port_outlives_headers_that_are_not_utf8(
    headers: list[tuple[bytes, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    server = RpcServer("127.0.0.1", 0)
    await server.start([])
    await server.set_serving(True)
    try:
        async with open_channel(server.address) as before, open_channel(server.address) as after:
            watch = health_pb2_grpc.HealthStub(before).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            for _ in range(3):
                await call(server.address, headers)
            answer = await health_pb2_grpc.HealthStub(after).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            await server.set_serving(False)  # a call that was open before goes on
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
    finally:
        await server.stop(0)
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


async def test_a_method_that_does_not_exist_is_unimplemented() -> None:
    server = RpcServer("127.0.0.1", 0)
    await server.start([])
    try:
        async with open_channel(server.address) as channel:
            for path in ("/nobody.Here/Method", "/grpc.health.v1.Health/Chuck"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary(path)(b"", timeout=10)  # type: ignore[call-arg]  # bytes as they are
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert b"grpc-status\x0212" in await call(server.address, grpc_headers(b"/\xe4\xff"))
    finally:
        await server.stop(0)
