"""The server every service runs: errors across the wire, health, reflection, ports that are taken."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from twotower.errors import CheckpointError, InvalidArgument, Overloaded, PortInUse, TwoTowerError
from twotower.rpc.channel import MAX_MESSAGE_BYTES, open_channel
from twotower.rpc.errors import RETRY_KEY, error_from_rpc
from twotower.rpc.server import LIVENESS, RpcServer
from twotower.status import STATUS
from twotower.v1 import inference_pb2, inference_pb2_grpc

SERVICE = "twotower.v1.Inference"


class Raises(inference_pb2_grpc.InferenceServicer):
    """Raises what it is given, at once (GetModel) or after an event (Generate)."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.closed = asyncio.Event()

    async def GetModel(self, request: Any, context: Any) -> Any:
        raise self.error

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield inference_pb2.GenerateEvent(accepted=inference_pb2.Accepted(request_id="1"))
            if request.text == "hang":
                await asyncio.Event().wait()
            raise self.error
        finally:
            self.closed.set()


@asynccontextmanager
async def serving(servicer: Raises) -> AsyncIterator[grpc.aio.Channel]:
    server = RpcServer("127.0.0.1", 0)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server.server)
    await server.start([SERVICE])
    channel = open_channel(server.address)
    try:
        yield channel
    finally:
        await channel.close(None)
        await server.stop(0)


def example(cls: type[TwoTowerError]) -> TwoTowerError:
    return InvalidArgument("gamma", "must be in [0, 1]: not 2") if cls is InvalidArgument else cls("what went wrong: é")


@pytest.mark.parametrize("cls", list(STATUS), ids=lambda c: c.__name__)
async def test_an_error_arrives_as_its_own_class(cls: type[TwoTowerError]) -> None:
    error = example(cls)
    async with serving(Raises(error)) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await stub.GetModel(inference_pb2.GetModelRequest())
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            async for _ in stub.Generate(inference_pb2.GenerateRequest()):
                pass
    for caught in (unary, stream):
        assert caught.value.code() is STATUS[cls].grpc
        arrived = error_from_rpc(caught.value)
        assert type(arrived) is cls
        assert str(arrived) == str(error)
    if isinstance(arrived, InvalidArgument):
        assert arrived.field == "gamma"


async def test_overloaded_says_when_to_retry() -> None:
    async with serving(Raises(Overloaded("full"))) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceStub(channel).GetModel(inference_pb2.GetModelRequest())
    assert (RETRY_KEY, "1") in list(caught.value.trailing_metadata())


async def test_an_unknown_error_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        async with serving(Raises(ValueError("secret"))) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await inference_pb2_grpc.InferenceStub(channel).GetModel(inference_pb2.GetModelRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error"
    assert "ValueError: secret" in caplog.text


async def test_a_cancelled_stream_ends_its_generator() -> None:
    servicer = Raises(CheckpointError("unused"))
    async with serving(servicer) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(text="hang"))
        await call.read()
        call.cancel()
        await asyncio.wait_for(servicer.closed.wait(), 10)


async def test_a_message_that_is_too_large_is_the_callers_fault() -> None:
    async with serving(Raises(CheckpointError("unused"))) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(
            inference_pb2.GenerateRequest(text="x" * (MAX_MESSAGE_BYTES + 1))
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert isinstance(error_from_rpc(caught.value), InvalidArgument)


async def test_health_follows_set_serving_and_reflection_lists_the_service() -> None:
    server = RpcServer("127.0.0.1", 0)
    inference_pb2_grpc.add_InferenceServicer_to_server(Raises(CheckpointError("unused")), server.server)
    await server.start([SERVICE])
    async with open_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for change in (None, True, False):
            if change is not None:
                await server.set_serving(change)
            for name in ("", SERVICE):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert (answer.status == health_pb2.HealthCheckResponse.SERVING) is bool(change)
            alive = await health.Check(health_pb2.HealthCheckRequest(service=LIVENESS))
            assert alive.status == health_pb2.HealthCheckResponse.SERVING  # a server that takes no work is no dead one
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        listed = {service.name async for message in call for service in message.list_services_response.service}
    await server.stop(0)
    assert {SERVICE, "grpc.health.v1.Health"} <= listed


async def test_a_taken_port_is_named_with_its_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = RpcServer("127.0.0.1", port, option="--grpc-port")
        with pytest.raises(PortInUse, match=rf"127\.0\.0\.1:{port} \(--grpc-port\): Address already in use"):
            await server.start([SERVICE])
        await server.stop(0)


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("127.0.0.1", 70000), ("no-such-host.invalid", 0)])
async def test_an_address_that_is_not_ours_is_one_clear_error(host: str, port: int) -> None:
    server = RpcServer(host, port)
    with pytest.raises(PortInUse, match="cannot listen on"):
        await server.start([SERVICE])
    await server.stop(0)


async def test_two_servers_cannot_share_a_port() -> None:
    first = RpcServer("127.0.0.1", 0)
    await first.start([])
    second = RpcServer("127.0.0.1", int(first.address.rsplit(":", 1)[1]))
    with pytest.raises(PortInUse):
        await second.start([])
    await second.stop(0)
    await first.stop(0)
