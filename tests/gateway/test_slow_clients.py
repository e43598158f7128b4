"""HTTP clients that are slow, silent, endless or too many: they lose, and others do not notice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.gateways import RunningGateway, gateway
from tests.support.scripted_context import ScriptedContext
from twotower.gateway import bodies, http_protocol

from .test_failures import SCRIPT

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
ASKED = json.dumps({"prompt": [5], "max_tokens": 4}).encode()


@asynccontextmanager
async def connection(running: RunningGateway) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = running.http.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes the connection, however it does."""
    got = b""
    async with asyncio.timeout(20):
        try:
            while piece := await reader.read(65536):
                got += piece
        except ConnectionError:
            pass
    return got


def status(answer: bytes) -> int:
    return int(answer.split()[1])


async def ask(running: RunningGateway, body: bytes = ASKED) -> tuple[int, bytes]:
    async with connection(running) as (reader, writer):
        writer.write(POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        answer = await rest(reader)
        return status(answer), answer.partition(b"\r\n\r\n")[2]


@pytest.fixture
async def running(checkpoint: Path) -> AsyncIterator[RunningGateway]:
    async with gateway(checkpoint, ScriptedContext(SCRIPT), max_bodies_bytes=4096, max_body_bytes=4096) as started:
        yield started


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.3)
    monkeypatch.setattr(http_protocol, "REST_S", 0.3)
    monkeypatch.setattr(bodies, "STALL_S", 0.3)
    monkeypatch.setattr(bodies, "WHOLE_S", 1.0)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("begun", [b"P", POST, POST + b"x-a: b\r\n", POST + b"x-a: b"])
async def test_a_head_that_does_not_end_is_refused_in_time(running: RunningGateway, begun: bytes) -> None:
    async with connection(running) as (reader, writer):
        writer.write(begun)
        assert status(await rest(reader)) == 408


@pytest.mark.usefixtures("impatient")
async def test_more_headers_gain_no_time(running: RunningGateway) -> None:
    async with connection(running) as (reader, writer):
        writer.write(POST)
        answer = asyncio.create_task(rest(reader))
        while not answer.done():
            writer.write(b"x-a: b\r\n")
            await asyncio.sleep(0.01)
        assert status(answer.result()) == 408


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("sent", [b"", b"\r\n"])
async def test_a_silent_connection_is_closed(running: RunningGateway, sent: bytes) -> None:
    async with connection(running) as (reader, writer):
        writer.write(sent)
        assert await rest(reader) == b""


@pytest.mark.usefixtures("impatient")
async def test_line_ends_do_not_keep_a_connection(running: RunningGateway) -> None:
    async with connection(running) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = asyncio.create_task(rest(reader))
        while not answer.done():
            writer.write(b"\r\n")
            await asyncio.sleep(0.01)
        assert status(answer.result()) == 200


@pytest.mark.usefixtures("impatient")
async def test_a_second_request_has_its_own_time(running: RunningGateway) -> None:
    async with connection(running) as (reader, writer):
        for _ in range(4):
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b'"alive"' in (await reader.readuntil(b"}"))
            await asyncio.sleep(0.1)
        writer.write(b"GET /heal")
        assert status(await rest(reader)) == 408


@pytest.mark.parametrize(
    "headers",
    [b"".join(b"x-%d: %s\r\n" % (i, b"a" * 1000) for i in range(400)), b"x: " + b"a" * 1_000_000, b"x: b\r\n" * 300 + b"\r\n"],
    ids=["large", "one", "many"],
)
async def test_a_head_without_end_is_refused_by_its_size(running: RunningGateway, headers: bytes) -> None:
    async with connection(running) as (reader, writer):
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + headers)
        assert status(await rest(reader)) == 431


async def test_a_long_url_is_refused(running: RunningGateway) -> None:
    async with connection(running) as (reader, writer):
        writer.write(b"GET /healthz?" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        assert status(await rest(reader)) == 431


async def test_of_too_many_beginners_the_oldest_goes(running: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_BEGINNING", 10)
    monkeypatch.setattr(http_protocol, "YIELD_S", 0.0)
    held = []
    for _ in range(25):
        host, _, port = running.http.removeprefix("http://").rpartition(":")
        held.append(await asyncio.open_connection(host, int(port)))
        held[-1][1].write(b"GET /he")
        await asyncio.sleep(0.01)
    assert (await ask(running))[0] == 200
    gone = [await asyncio.wait_for(reader.read(), 10) for reader, _ in held[:15]]
    assert gone == [b""] * 15
    held[-1][1].write(b"althz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert status(await rest(held[-1][0])) == 200
    for _, writer in held:
        writer.close()


@pytest.mark.usefixtures("impatient")
async def test_a_body_that_stalls_is_refused_in_time(running: RunningGateway) -> None:
    async with connection(running) as (reader, writer):
        writer.write(POST + b"content-length: %d\r\n\r\n" % len(ASKED) + ASKED[:-1])
        answer = await rest(reader)
        assert status(answer) == 408
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "the body came too slowly"


@pytest.mark.usefixtures("impatient")
async def test_a_body_that_trickles_is_refused_in_time(running: RunningGateway) -> None:
    async with connection(running) as (reader, writer):
        writer.write(POST + b"content-length: 4000\r\n\r\n")
        answer = asyncio.create_task(rest(reader))
        while not answer.done():
            writer.write(b" ")
            await asyncio.sleep(0.05)
        assert status(answer.result()) == 408


@pytest.mark.usefixtures("impatient")
async def test_a_body_that_nobody_asked_for_keeps_no_connection(running: RunningGateway) -> None:
    async with connection(running) as (reader, writer):
        writer.write(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 4000\r\n\r\n")
        answer = asyncio.create_task(rest(reader))
        while not answer.done():
            writer.write(b" ")
            await asyncio.sleep(0.05)
        assert status(answer.result()) == 404


async def test_a_body_is_refused_by_its_announced_length(running: RunningGateway) -> None:
    async with connection(running) as (reader, writer):
        writer.write(POST + b"content-length: 4097\r\n\r\n")  # and not a byte of it
        assert status(await rest(reader)) == 413


async def test_stalled_bodies_give_way(running: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold all the room there is, and lose it to whoever needs it."""
    monkeypatch.setattr(bodies, "YIELD_S", 0.05)
    async with connection(running) as (first, one), connection(running) as (second, two):
        for writer in (one, two):
            writer.write(POST + b"content-length: 2048\r\n\r\n" + b" " * 2047)
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        assert (await ask(running))[0] == 200
        assert status(await rest(first)) == 408  # it stalled first
        two.write(b"1")
        assert status(await second.read(100)) == 400  # the other was needed no more than that
        whole = b'{"prompt": [5], "max_tokens": 4' + b" " * 4000 + b"}"
        assert (await ask(running, whole))[0] == 200


async def test_bodies_that_come_are_not_robbed(running: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "YIELD_S", 60.0)
    async with connection(running) as (reader, writer):
        writer.write(POST + b"connection: close\r\ncontent-length: 4096\r\n\r\n" + b" " * (4095 - len(ASKED)))
        while (answer := await ask(running, b" " * 3000 + ASKED))[0] != 429:
            pass  # until it has arrived
        assert b"try again" in answer[1]
        writer.write(b" " + ASKED)
        assert status(await rest(reader)) == 200
    assert (await ask(running, b" " * 3000 + ASKED))[0] == 200
