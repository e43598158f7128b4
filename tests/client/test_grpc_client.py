"""What the client says when it is not a gateway, or nobody, that answers. (What it does with one: tests/gateway.)"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from twotower.client.grpc_client import GatewayClient
from twotower.errors import InvalidArgument, TwoTowerError, Unavailable
from twotower.rpc.server import RpcServer


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


async def use(client: GatewayClient) -> None:
    async for _ in client.generate([5]):
        pass


async def test_no_gateway_at_all(nobody: str) -> None:
    async with GatewayClient(nobody) as client:
        for attempt in (use(client), client.model(), client.wait_ready(0.3)):
            with pytest.raises(Unavailable, match=rf"^no gateway answers at {nobody}"):
                await attempt


async def test_a_host_that_does_not_exist() -> None:
    async with GatewayClient("no-such-host.invalid:1") as client:
        with pytest.raises(Unavailable, match=r"no gateway answers at no-such-host\.invalid:1"):
            await use(client)


async def test_another_grpc_server() -> None:
    server = RpcServer("127.0.0.1", 0)
    await server.start([])
    async with GatewayClient(server.address) as client:
        with pytest.raises(Unavailable, match="is no twotower gateway"):
            await use(client)
        with pytest.raises(Unavailable, match="is not ready"):
            await client.wait_ready(0.3)
    await server.stop(0)


async def test_a_server_that_speaks_http() -> None:
    """As when the two ports are mixed up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with GatewayClient(address) as client:
        with pytest.raises(TwoTowerError, match=f"no gateway answers at {address}"):
            await use(client)
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize("arguments", [{"seed": 2**64}, {"max_tokens": -(2**70)}, {"prompt": "a\ud800"}, {"prompt": [2**70]}])
async def test_what_no_message_can_hold(nobody: str, arguments: dict[str, object]) -> None:
    async with GatewayClient(nobody) as client:
        with pytest.raises(InvalidArgument):
            async for _ in client.generate(**{"prompt": [5], **arguments}):  # type: ignore[arg-type]
                pass
