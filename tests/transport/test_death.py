"""The other process is killed in the middle of a transfer: no end waits for ever, and no memory stays."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from tests.support.transports import CONTEXT_ADDRESS, CPU, WORKER_PEER, mapped_segments, same_bits, sent
from tests.support.waiting import until
from twotower.errors import Unavailable
from twotower.transport.config import Kind, TransportConfig
from twotower.transport.ends import ContextTransports, WorkerTransports
from twotower.internal.v1 import context_pb2
from twotower.wire.frames import Key, Spec

BIG = [(Key("ssm", 0), torch.ones(20_000_000))]


class Peer:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def hear(self) -> bytes:
        assert self.process.stdout is not None
        return bytes.fromhex((await self.process.stdout.readline()).decode())

    def tell(self, message: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(message.hex().encode() + b"\n")

    async def die(self) -> None:
        self.process.kill()
        await self.process.wait()


@asynccontextmanager
async def _peer(role: str, kind: Kind) -> AsyncIterator[Peer]:
    pipe = asyncio.subprocess.PIPE
    argv = (sys.executable, "-m", "tests.support.transport_peer", role, kind.value)
    process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
    try:
        yield Peer(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("kind", [Kind.SHM, Kind.DIST])
async def test_a_worker_dies(kind: Kind) -> None:
    before = sorted(os.listdir("/dev/shm"))
    context = ContextTransports(TransportConfig(kind, timeout_s=60), "127.0.0.1", CPU)
    async with _peer("worker", kind) as peer, asyncio.timeout(50):
        outlet, choice = context.attach(context_pb2.TransportOffer.FromString(await peer.hear()), WORKER_PEER)
        peer.tell(choice.SerializeToString())
        assert await peer.hear() == b"attached"
        messages = sent(outlet, BIG)
        assert (await anext(messages)).HasField("placed")
        rest = asyncio.create_task(anext(messages, None))
        await asyncio.sleep(0.1)
        assert rest.done() == (kind is Kind.SHM)  # with dist, the context is in the middle of sending
        await peer.die()
        with pytest.raises(Unavailable):
            _ = [await rest, *[message async for message in sent(outlet, BIG)]]
        await messages.aclose()
        await outlet.close()
        await until(lambda: mapped_segments() == 0)
    context.close()
    assert sorted(os.listdir("/dev/shm")) == before


@pytest.mark.parametrize("kind", [Kind.SHM, Kind.DIST])
async def test_a_context_dies(kind: Kind) -> None:
    before = sorted(os.listdir("/dev/shm"))
    worker = WorkerTransports(TransportConfig(kind, timeout_s=60), CPU)
    async with _peer("context", kind) as peer, asyncio.timeout(50):
        peer.tell(worker.offer.SerializeToString())
        inlet = worker.attach(context_pb2.TransportChoice.FromString(await peer.hear()), CONTEXT_ADDRESS)
        message = context_pb2.ContextMessage.FromString(await peer.hear())
        arrival = inlet.expect({Key("ssm", 0): Spec(torch.float32, (1000,))}, CPU)
        adding = asyncio.create_task(arrival.add(message))
        await asyncio.sleep(0.1)
        await peer.die()
        if kind is Kind.DIST:
            with pytest.raises(Unavailable):
                await adding
        else:  # what was written can still be read, and is gone after that
            await adding
            tensors = await arrival.tensors()
            assert same_bits(tensors[Key("ssm", 0)], torch.arange(1000, dtype=torch.float32))
            assert mapped_segments() == 1
            del tensors, arrival
            adding = None  # type: ignore[assignment]
            await until(lambda: mapped_segments() == 0)
    worker.close()
    assert sorted(os.listdir("/dev/shm")) == before
