"""Connecting: what is wrong is said, and no password is."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.redis_server import embedded_redis
from twotower.broker.connection import connect, shown_url
from twotower.errors import BrokerUnavailable, ConfigError


async def test_nothing_listens() -> None:
    with pytest.raises(BrokerUnavailable, match=r"redis://\*\*\*@127\.0\.0\.1:1 ") as caught:
        await connect("redis://me:secret@127.0.0.1:1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "localhost", "http://127.0.0.1", "redis://127.0.0.1:x"])
async def test_no_redis_url(url: str) -> None:
    with pytest.raises(ConfigError, match="redis"):
        await connect(url)


async def test_what_answers_is_no_redis() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(BrokerUnavailable, match=f"127.0.0.1:{port} does not answer"):
        await connect(f"redis://127.0.0.1:{port}")
    server.close()
    await server.wait_closed()


async def test_a_password() -> None:
    async with embedded_redis() as server:
        client = await connect(server.url)
        await client.config_set("requirepass", "secret")
        await client.aclose()
        with pytest.raises(BrokerUnavailable):
            await connect(server.url)
        client = await connect(server.url + "?password=secret")
        assert await client.ping()
        await client.aclose()


def test_shown_urls() -> None:
    assert shown_url("redis://h:1/0") == "redis://h:1/0"
    assert shown_url("rediss://u:p@h:1/0?x=1") == "rediss://***@h:1/0?x=1"


@pytest.mark.parametrize("url", ["redis://:se/cret@h", "redis://me:secret@[::1", "redis://h:x?password=secret"])
async def test_a_url_that_is_none_keeps_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await connect(url)
    assert "cret" not in str(caught.value)


async def test_what_accepts_and_says_nothing() -> None:
    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    with pytest.raises(BrokerUnavailable, match="no reply in time"):
        await connect(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    server.close()
    await server.wait_closed()
