"""Both ends of a transport in this process, and the stream between them: real sockets, real memory, real groups."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twotower.internal.v1 import link_pb2
from twotower.transport.config import TransportConfig
from twotower.transport.dist import DistInlet, DistOutlet
from twotower.transport.ends import ContextTransports, WorkerTransports
from twotower.transport.interface import Inlet, Outlet, Received
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
        """The two ends of a link."""
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


async def joined(outlet: Outlet, inlet: Inlet) -> None:
    """Wait until both ends of a link are where they meet, if they are to meet."""
    if isinstance(outlet, DistOutlet) and isinstance(inlet, DistInlet):
        await asyncio.gather(outlet.group.joined(), inlet.group.joined())


def spec_of(tensors: Named) -> dict[Key, Spec]:
    return {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


class Stream:
    """A link's stream, from the context to the worker: messages leave it as they would leave the wire."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def write(self, message: link_pb2.ContextMessage) -> None:
        """As the context writes."""
        self._messages.put_nowait(message.SerializeToString())
        await asyncio.sleep(0)

    async def read(self) -> link_pb2.ContextMessage | None:
        """As the worker reads."""
        message = await self._messages.get()
        return None if message is None else link_pb2.ContextMessage.FromString(message)

    def end(self) -> None:
        """Nothing comes behind what was written."""
        self._messages.put_nowait(None)


def header(placed: link_pb2.Placed | None) -> link_pb2.ContextMessage:
    """The message that all tensors here belong to."""
    return link_pb2.ContextMessage(state=link_pb2.State(tensors=placed))


async def send(outlet: Outlet, tensors: Iterable[tuple[Key, Tensor]], stream: Stream) -> None:
    """A transfer, and a message of the link behind it, as others always follow."""
    await outlet.send(list(tensors), header, stream.write)
    await stream.write(link_pb2.ContextMessage(ended=link_pb2.Ended()))


async def messages(outlet: Outlet, tensors: Iterable[tuple[Key, Tensor]]) -> list[link_pb2.ContextMessage]:
    """What a transfer writes to the stream, with nobody to receive it: not with `dist`, which waits for the worker."""
    stream = Stream()
    await outlet.send(list(tensors), header, stream.write)
    stream.end()
    written = []
    while (message := await stream.read()) is not None:
        written.append(message)
    return written


async def receive(inlet: Inlet, stream: Stream, expected: Mapping[Key, Spec]) -> Received:
    """The transfer that the next message announces."""
    message = await stream.read()
    assert message is not None
    assert message.HasField("state")
    return await inlet.receive(placed_in(message), expected, CPU, stream.read)


def placed_in(message: link_pb2.ContextMessage) -> link_pb2.Placed | None:
    """Where the tensors of a header lie; None: in frames."""
    return message.state.tensors if message.state.HasField("tensors") else None


async def arrive(outlet: Outlet, inlet: Inlet, tensors: Iterable[tuple[Key, Tensor]], expected: Mapping[Key, Spec]) -> Received:
    """A transfer from one end to the other, not released yet. Raises what the worker's end raises, or the context's."""
    stream = Stream()
    sending = asyncio.create_task(send(outlet, tensors, stream))
    receiving = asyncio.create_task(receive(inlet, stream, expected))
    try:
        await asyncio.wait((sending, receiving), return_when=asyncio.FIRST_EXCEPTION)
        for task in (receiving, sending):
            if task.done():
                task.result()
        return receiving.result()
    finally:
        for task in (sending, receiving):
            task.cancel()
        await asyncio.gather(sending, receiving, return_exceptions=True)


async def transfer(
    outlet: Outlet, inlet: Inlet, tensors: Iterable[tuple[Key, Tensor]], expected: Mapping[Key, Spec]
) -> dict[Key, Tensor]:
    """Copies of what arrives."""
    received = await arrive(outlet, inlet, tensors, expected)
    copies = {key: tensor.clone() for key, tensor in received.tensors.items()}
    received.release()
    return copies


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN payloads and signed zeros included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def mapped_segments(pid: int | str = "self") -> int:
    """Segments that a process has mapped; of this one, without what only waits to be collected."""
    gc.collect()
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:twotower")
