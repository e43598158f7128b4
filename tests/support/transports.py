"""Both ends of a transport in this process, and what travels between them: real sockets, real memory, real groups."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twotower.transport.config import TransportConfig
from twotower.transport.ends import ContextTransports, WorkerTransports
from twotower.transport.interface import Inlet, Outlet
from twotower.internal.v1 import context_pb2
from twotower.wire.frames import Key, Spec

CPU = torch.device("cpu")
CONTEXT_ADDRESS = "127.0.0.1:50000"
"""Only its host is used."""
WORKER_PEER = "ipv4:127.0.0.1:50001"

Named = Mapping[Key, Tensor]


@dataclass
class Ends:
    """A context's process and a worker's."""

    context: ContextTransports
    worker: WorkerTransports

    def attach(self) -> tuple[Outlet, Inlet]:
        outlet, choice = self.context.attach(self.worker.offer, WORKER_PEER)
        return outlet, self.worker.attach(choice, CONTEXT_ADDRESS)


@asynccontextmanager
async def ends(context: TransportConfig, worker: TransportConfig | None = None) -> AsyncIterator[Ends]:
    both = Ends(ContextTransports(context, "127.0.0.1", CPU), WorkerTransports(worker or context, CPU))
    try:
        yield both
    finally:
        both.context.close()
        both.worker.close()


def spec_of(tensors: Named) -> dict[Key, Spec]:
    return {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


async def sent(outlet: Outlet, tensors: Iterable[tuple[Key, Tensor]]) -> AsyncGenerator[context_pb2.ContextMessage]:
    """The messages, as they come out of the wire."""
    async with aclosing(outlet.send(tensors)) as messages:
        async for message in messages:
            yield context_pb2.ContextMessage.FromString(message.SerializeToString())


async def transfer(
    outlet: Outlet, inlet: Inlet, tensors: Iterable[tuple[Key, Tensor]], expected: Mapping[Key, Spec]
) -> dict[Key, Tensor]:
    """Copies of what arrives."""
    stream: asyncio.Queue[context_pb2.ContextMessage | None] = asyncio.Queue()

    async def send() -> None:
        try:
            async for message in sent(outlet, tensors):
                await stream.put(message)
        finally:
            await stream.put(None)

    sending = asyncio.create_task(send())
    try:
        with inlet.expect(expected, CPU) as arrival:
            while (message := await stream.get()) is not None:
                assert await arrival.add(message)
            await sending
            return {key: tensor.clone() for key, tensor in (await arrival.tensors()).items()}
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN payloads and signed zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def mapped_segments(pid: int | str = "self") -> int:
    """Segments that a process has mapped; of this one, without what only waits to be collected."""
    gc.collect()
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:twotower")
