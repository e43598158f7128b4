"""A peer that is stopped is noticed, though its connection stays open."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import grpc
import pytest

from twotower.rpc import channel
from twotower.rpc.channel import CHANNEL_OPTIONS, keepalive

SERVER = """
import asyncio, grpc
from twotower.rpc.server import SERVER_OPTIONS

async def stream(request, context):
    yield b"alive"
    await asyncio.Event().wait()

async def main():
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers = {"Stream": grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()

asyncio.run(main())
"""


def test_the_limits_are_those_of_every_channel() -> None:
    assert set(keepalive(channel.KEEPALIVE_MS, channel.KEEPALIVE_TIMEOUT_MS)) <= set(CHANNEL_OPTIONS)


async def test_a_call_to_a_process_that_is_stopped_fails() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        options = dict(CHANNEL_OPTIONS) | dict(keepalive(500, 1000))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=tuple(options.items())) as dialled:
            open_stream: Any = dialled.unary_stream
            call = open_stream("/test/Stream")(b"")
            assert await call.read() == b"alive"
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async with asyncio.timeout(30):
                    await call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        process.kill()
        await process.wait()
