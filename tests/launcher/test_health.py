"""Who answers: real ports, asked as the launcher asks."""

from __future__ import annotations

import asyncio
import socket

from twotower.launcher.health import answers
from twotower.rpc.server import RpcServer


async def test_a_grpc_server_answers_whether_it_serves_or_not() -> None:
    server = RpcServer("127.0.0.1", 0)
    await server.start([])
    addresses = {"grpc": server.address}
    try:
        assert await answers(addresses, 5)  # it says NOT_SERVING
        await server.set_serving(True)
        assert await answers(addresses, 5)
    finally:
        await server.stop(0)
    assert not await answers(addresses, 5)


async def test_a_port_that_takes_connections_and_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        assert not await answers({"grpc": address}, 0.2)
        assert not await answers({"http": address}, 0.2)


async def test_http_counts_whatever_its_status() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert await answers({"http": address}, 5)
        with socket.create_server(("127.0.0.1", 0)) as mute:  # all that it listens on must answer
            other = f"127.0.0.1:{mute.getsockname()[1]}"
            assert not await answers({"http": address, "grpc": other}, 0.3)
