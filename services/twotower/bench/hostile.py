"""Clients that try to stall a gateway, as a process: ``python -m twotower.bench.hostile --grpc A --http A --body N``.

All kinds run at once, again and again. Their outcomes are counted by kind and printed as one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
from collections.abc import Awaitable, Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from twotower.rpc.files import allow_many_files
from twotower.v1 import inference_pb2

MESSAGE = 8 * 1024 * 1024
UPLOADS = 32
HEADS = 3000
WATCHES = 1000
CONNECTIONS = 10
GENERATE = "/twotower.v1.Inference/Generate"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"

Count = collections.Counter[str]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Hostile:
    """The clients; each method runs one kind of client once."""

    def __init__(self, grpc_address: str, http_address: str, body_bytes: int) -> None:
        """`body_bytes`: the size of the largest bodies; larger ones would be refused unread."""
        self._body_bytes = body_bytes
        self._grpc = grpc_address
        self._http = http_address
        self.count: Count = collections.Counter()
        self._large = {
            "text": b'{"prompt":"' + b"Tom owns 12 pens. " * ((body_bytes - 20) // 18) + b'"}',
            "ids": b'{"prompt":[' + b"5," * ((body_bytes - 20) // 2) + b"5]}",
            "depth": b'{"prompt":' + b"[" * (body_bytes - 20) + b"}",
            "escapes": b'{"prompt":"' + b"\\u00e9" * ((body_bytes - 20) // 6) + b'"}',
            "commas": b'{"prompt":"' + b"," * (body_bytes - 20) + b'"}',
            "quotes": b'{"prompt":[' + b'"a",' * ((body_bytes - 20) // 4) + b'"a"]}',
            "digits": b'{"prompt":[' + (b"9" * 600 + b",") * ((body_bytes - 20) // 601) + b"5]}",
        }
        self._messages = {
            "grpc ids": inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[5] * (MESSAGE - 20))),
            "grpc text": inference_pb2.GenerateRequest(text="Tom owns 12 pens. " * 5000),
        }

    async def large_bodies(self) -> None:
        """One body of the largest size, whole."""
        for kind, body in self._large.items():
            try:
                reader, writer = await self._connect()
                writer.write(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body))
                writer.write(body)
                self._saw(kind, (await reader.readline())[9:12].decode() or "closed")
                writer.close()
            except OSError as error:
                self._saw(kind, type(error).__name__)

    async def stalled_bodies(self) -> None:
        """Bodies that stop one byte short."""
        await asyncio.gather(*(self._stalled_body() for _ in range(UPLOADS)))

    async def _stalled_body(self) -> None:
        try:
            reader, writer = await self._connect()
            writer.write(POST + b"content-length: %d\r\n\r\n" % self._body_bytes + b" " * (self._body_bytes - 1))
            self._saw("stalled body", (await reader.readline())[9:12].decode() or "closed")
            writer.close()
        except OSError as error:
            self._saw("stalled body", type(error).__name__)

    async def half_heads(self) -> None:
        """Connections that slowly send header after header, and never the last one."""
        held: list[Streams] = []
        for i in range(HEADS):
            try:
                held.append(await self._connect())
            except OSError:
                break
            held[-1][1].write(POST)
            if i % 100 == 0:
                await asyncio.sleep(0.05)
        for _ in range(3):
            await asyncio.sleep(1)
            for _, writer in held:
                if not writer.is_closing():
                    writer.write(b"x-a: b\r\n")
        for reader, writer in held:
            self.count["half head: closed" if reader.at_eof() or reader.exception() else "half head: open"] += 1
            writer.transport.abort()

    async def endless_head(self) -> None:
        """A request head with one endless header."""
        try:
            reader, writer = await self._connect()
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: ")
            for _ in range(200):
                writer.write(b"a" * 65536)
                await writer.drain()
            self._saw("endless head", (await reader.readline())[9:12].decode() or "closed")
            writer.close()
        except OSError as error:
            self._saw("endless head", type(error).__name__)

    async def watches(self) -> None:
        """Health watches that are never read."""
        channels = [self._channel() for _ in range(CONNECTIONS)]
        calls = []
        for channel in channels:
            stub = health_pb2_grpc.HealthStub(channel)
            calls += [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(WATCHES)]
            await asyncio.sleep(0.2)
        ended = [asyncio.ensure_future(call.code()) for call in calls]
        _, holding = await asyncio.wait(ended, timeout=3)
        self.count["watch: open"] += len(holding)
        self.count["watch: refused"] += len(ended) - len(holding)
        for code in holding:
            code.cancel()
        for channel in channels:
            await channel.close(None)

    async def large_messages(self) -> None:
        """gRPC messages of the largest size."""
        channel = self._channel()
        for kind, message in self._messages.items():
            data = message.SerializeToString()
            await self._call(kind, channel, data)
        await channel.close(None)

    async def malformed_messages(self) -> None:
        """Messages that are no protobuf."""
        channel = self._channel()
        await asyncio.gather(*(self._call("malformed", channel, random.randbytes(40)) for _ in range(200)))
        await channel.close(None)

    async def half_calls(self) -> None:
        """Calls whose message never comes."""
        channel = self._channel()

        async def one() -> None:
            call = channel.stream_stream(GENERATE, None, None)(None)
            reading = asyncio.ensure_future(call.read())
            await asyncio.wait((reading,), timeout=5)
            self.count["half call: ended" if call.done() else "half call: open"] += 1
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)

        await asyncio.gather(*(one() for _ in range(500)))
        await channel.close(None)

    async def bad_paths(self) -> None:
        """Calls whose path is not UTF-8."""
        name, value = b"\x00\x05:path", b"/\xe4\xff"
        block = b"\x83\x86" + name + bytes([len(value)]) + value + b"\x0f\x10\x10application/grpc"
        head = len(block).to_bytes(3, "big") + b"\x01\x05\x00\x00\x00\x01" + block
        for _ in range(20):
            host, _, port = self._grpc.rpartition(":")
            try:
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + head)
                await writer.drain()
                await asyncio.sleep(0.05)
                writer.close()
                self.count["bad path"] += 1
            except OSError as error:
                self._saw("bad path", type(error).__name__)

    async def _call(self, kind: str, channel: grpc.aio.Channel, data: bytes) -> None:
        call = channel.unary_stream(GENERATE, None, None)(data, timeout=20)
        try:
            async for _ in call:
                pass
        except grpc.aio.AioRpcError:
            pass
        self._saw(kind, (await call.code()).name)

    def _channel(self) -> grpc.aio.Channel:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", 1 << 24))
        return grpc.aio.insecure_channel(self._grpc, options=options)

    async def _connect(self) -> Streams:
        host, _, port = self._http.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    def _saw(self, kind: str, answer: str) -> None:
        self.count[f"{kind}: {answer}"] += 1

    @property
    def kinds(self) -> list[Callable[[], Awaitable[None]]]:
        """All kinds of clients."""
        return [
            *(self.large_bodies, self.stalled_bodies, self.half_heads, self.endless_head, self.watches),
            *(self.large_messages, self.malformed_messages, self.half_calls, self.bad_paths),
        ]


async def _again_and_again(kind: Callable[[], Awaitable[None]]) -> None:
    while True:
        await kind()


async def run(grpc_address: str, http_address: str, body_bytes: int, seconds: float, only: str) -> Count:
    """Run all kinds at once, for `seconds`."""
    allow_many_files()
    hostile = Hostile(grpc_address, http_address, body_bytes)
    print("ready", flush=True)
    kinds = [kind for kind in hostile.kinds if only in kind.__name__]
    tasks = [asyncio.create_task(_again_and_again(kind)) for kind in kinds]
    _, pending = await asyncio.wait(tasks, timeout=seconds)
    for task in pending:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            hostile.count[f"error: {result!r}"] += 1
    return hostile.count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grpc", required=True)
    parser.add_argument("--http", required=True)
    parser.add_argument("--body", type=int, required=True, help="bytes of the largest body that is taken")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    options = parser.parse_args()
    counted = asyncio.run(run(options.grpc, options.http, options.body, options.seconds, options.only))
    print(json.dumps(dict(sorted(counted.items()))), flush=True)
