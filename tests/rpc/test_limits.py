"""Calls that are too many, or begin and do not go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.http2 import call, grpc_headers
from tests.support.waiting import until
from twotower.errors import DeadlineExceeded, InvalidArgument, Overloaded
from twotower.rpc import health, limits
from twotower.rpc.channel import open_channel
from twotower.rpc.errors import error_from_rpc
from twotower.rpc.server import RpcServer
from twotower.v1 import inference_pb2, inference_pb2_grpc

GENERATE = grpc_headers(b"/twotower.v1.Inference/Generate")
HALF = b"\x00\x00\x00\x00\x64" + b"\x00" * 40
"""Of a message of 100 bytes."""


class Servicer(inference_pb2_grpc.InferenceServicer):
    """Holds every generation until it is left."""

    def __init__(self) -> None:
        self.running = 0

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.running += 1
        try:
            yield inference_pb2.GenerateEvent()
            await asyncio.Event().wait()
        finally:
            self.running -= 1

    async def GetModel(self, request: Any, context: Any) -> Any:
        return inference_pb2.GetModelResponse(model="m")


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[Servicer, str, grpc.aio.Channel]]:
    servicer, server = Servicer(), RpcServer("127.0.0.1", 0, **options)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server.server)
    await server.start(["twotower.v1.Inference"])
    channel = open_channel(server.address)
    try:
        yield servicer, server.address, channel
    finally:
        await channel.close(None)
        await server.stop(0)


async def ended_with(call: Any) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return error_from_rpc(caught.value)


async def test_a_message_that_does_not_come_ends_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MESSAGE_S", 0.3)
    async with serving() as (servicer, address, channel):
        for data in (b"", HALF):
            answer = await call(address, GENERATE, data, wait_s=20)
            assert b"grpc-status\x014" in answer
            assert b"the message of the call came too slowly" in answer
        silent = asyncio.Event()

        async def never() -> AsyncIterator[bytes]:
            await silent.wait()
            yield b""

        error = await ended_with(channel.stream_stream(GENERATE[2][1].decode())(never()))  # type: ignore[call-arg]
        assert isinstance(error, DeadlineExceeded)
        assert servicer.running == 0


async def test_a_call_without_a_message_is_the_callers_fault() -> None:
    async with serving() as (_, _, channel):
        kinds: list[Any] = [channel.stream_stream, channel.stream_unary]
        for kind in kinds:
            method = "Generate" if kind == channel.stream_stream else "GetModel"
            ended = kind(f"/twotower.v1.Inference/{method}")(iter(()))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await (ended.read() if method == "Generate" else ended)
            error = error_from_rpc(caught.value)
            assert isinstance(error, InvalidArgument)
            assert str(error) == "message: is missing"


async def test_calls_that_do_not_begin_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BEGINNING", 4)
    monkeypatch.setattr(limits, "YIELD_S", 0.1)
    async with serving() as (_, address, channel):
        stalled = [asyncio.create_task(call(address, GENERATE, HALF, wait_s=20)) for _ in range(8)]
        await asyncio.wait(stalled, timeout=0.5)
        stub = inference_pb2_grpc.InferenceStub(channel)
        for _ in range(6):
            assert (await stub.GetModel(inference_pb2.GetModelRequest())).model == "m"
        done, others = await asyncio.wait(stalled, timeout=0.5)
        assert all(b"came too slowly" in task.result() for task in done)
        assert 5 <= len(done) <= 6  # as much room as was needed, no more
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def test_many_that_begin_at_once_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_BEGINNING", 4)
    async with serving() as (_, _, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        answers = await asyncio.gather(*(stub.GetModel(inference_pb2.GetModelRequest()) for _ in range(200)))
        assert {answer.model for answer in answers} == {"m"}


async def test_one_call_too_many_is_refused_and_health_is_not() -> None:
    async with serving(max_calls=3) as (servicer, address, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        held = [stub.Generate(inference_pb2.GenerateRequest()) for _ in range(3)]
        await until(lambda: servicer.running == 3)
        for _ in range(2):
            assert isinstance(await ended_with(stub.Generate(inference_pb2.GenerateRequest())), Overloaded)
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        # Those that do not begin are not counted: they can keep nobody out.
        stalled = [asyncio.create_task(call(address, GENERATE, HALF, wait_s=20)) for _ in range(8)]
        await asyncio.wait(stalled, timeout=0.3)
        held[0].cancel()
        await until(lambda: servicer.running == 2)
        assert (await stub.GetModel(inference_pb2.GetModelRequest())).model == "m"
        for going_on in (*held, *stalled):
            going_on.cancel()
        await asyncio.gather(*stalled, return_exceptions=True)


async def test_watches_are_for_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_WATCHES", 2)
    async with serving() as (_, _, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        held = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
        for watch in held:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for _ in range(3):
            assert isinstance(await ended_with(stub.Watch(health_pb2.HealthCheckRequest())), Overloaded)
        held[0].cancel()
        await until_watched(stub)
        held[1].cancel()


async def until_watched(stub: health_pb2_grpc.HealthStub) -> None:
    async with asyncio.timeout(20):
        while True:
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            try:
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            except grpc.aio.AioRpcError:
                continue  # the other has not yet left
            watch.cancel()
            return


async def test_a_message_that_is_too_large_for_this_server() -> None:
    async with serving(max_message_bytes=1000) as (_, _, channel):
        stub = inference_pb2_grpc.InferenceStub(channel)
        error = await ended_with(stub.Generate(inference_pb2.GenerateRequest(text="x" * 1001)))
        assert isinstance(error, InvalidArgument)
        assert (await stub.GetModel(inference_pb2.GetModelRequest())).model == "m"
