"""The speed of a state's transfer between two processes, at the published model's size, over each transport.

The context's end is a separate process (`python -m twotower.bench.transport`): a gRPC server whose `Link` sends a
snapshot or a delta on request. This process is the worker's end, and measures the time from the request until all
tensors are copied to its own.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from twotower.bench.sizes import REAL
from twotower.internal.v1 import context_pb2_grpc, link_pb2
from twotower.model.config import ModelConfig
from twotower.rpc.channel import open_channel
from twotower.rpc.server import RpcServer
from twotower.transport.config import TransportConfig, TransportKind
from twotower.transport.ends import ContextTransports, WorkerTransports
from twotower.transport.interface import Inlet
from twotower.transport.layout import off_loop
from twotower.wire.frames import Key, Spec, num_bytes
from twotower.wire.state import delta_spec, state_spec

CPU = torch.device("cpu")
BLOCK = 16
WARM_UP = 2


@dataclass(frozen=True)
class Measured:
    """The medians of one transport."""

    snapshot_ms: float
    delta_ms: float
    gb_per_s: float
    """The rate of a snapshot's transfer."""


class _Sender(context_pb2_grpc.ContextTowerServicer):
    """Sends tensors of the real size on request: `Alive.forwards` is the number of tokens, 0 for a delta."""

    def __init__(self, transports: ContextTransports) -> None:
        self._transports = transports

    async def Link(self, requests: AsyncIterator[link_pb2.WorkerMessage], context: Any) -> None:
        """A link that begins with Hello, as in the service."""
        hello = await anext(requests)
        outlet, choice = self._transports.attach(hello.hello.transport, context.peer())
        await context.write(link_pb2.ContextMessage(welcome=link_pb2.Welcome(transport=choice)))
        held: dict[int, list[tuple[Key, Tensor]]] = {}
        async for request in requests:
            length = request.alive.forwards
            if length not in held:
                held[length] = [(key, torch.ones(each.shape, dtype=each.dtype)) for key, each in _spec(length).items()]
            await outlet.send(held[length], _header, context.write)
        await outlet.close()


def _header(placed: link_pb2.Placed | None) -> link_pb2.ContextMessage:
    return link_pb2.ContextMessage(state=link_pb2.State(tensors=placed))


async def measure(kind: TransportKind, length: int, rounds: int) -> Measured:
    """Medians of `rounds` snapshots of `length` tokens and as many deltas. Raises TwoTowerError if `kind` cannot be used."""
    config = TransportConfig(kind)
    worker = WorkerTransports(config, CPU)
    try:
        async with _sender(kind) as address:
            channel = open_channel(address)
            call: Any = context_pb2_grpc.ContextTowerStub(channel).Link()
            try:
                await call.write(link_pb2.WorkerMessage(hello=link_pb2.Hello(transport=worker.offer)))
                inlet = worker.attach((await call.read()).welcome.transport, address)
                snapshot = await _seconds(call, inlet, length, rounds)
                delta = await _seconds(call, inlet, 0, rounds)
            finally:
                call.cancel()
                await channel.close(None)
    finally:
        worker.close()
    size = sum(map(num_bytes, _spec(length).values()))
    return Measured(snapshot * 1000, delta * 1000, size / snapshot / 1e9)


async def _seconds(call: Any, inlet: Inlet, length: int, rounds: int) -> float:
    """Median time of one transfer into allocated memory, such as a worker's pool."""
    spec = _spec(length)
    own = {key: torch.zeros(each.shape, dtype=each.dtype) for key, each in spec.items()}
    times = []
    for _ in range(WARM_UP + rounds):
        start = time.perf_counter()
        await call.write(link_pb2.WorkerMessage(alive=link_pb2.Alive(forwards=length)))
        header = (await call.read()).state
        placed = header.tensors if header.HasField("tensors") else None
        received = await inlet.receive(placed, spec, CPU, call.read)
        await off_loop(received.size, CPU, lambda tensors=received.tensors: _copy(own, tensors))  # type: ignore[misc]
        received.release()
        times.append(time.perf_counter() - start)
    return median(times[WARM_UP:])


def _copy(own: Mapping[Key, Tensor], tensors: Mapping[Key, Tensor]) -> None:
    for key, tensor in tensors.items():
        own[key].copy_(tensor)


def _spec(length: int) -> Mapping[Key, Spec]:
    """The tensors of a state of `length` tokens, or of a block's delta for 0."""
    config = ModelConfig.from_dict(REAL)
    return state_spec(config, torch.bfloat16, length) if length else delta_spec(config, torch.bfloat16, 1, BLOCK)


@asynccontextmanager
async def _sender(kind: TransportKind) -> AsyncIterator[str]:
    """The address of a context's end in a separate process, which ends with this one."""
    argv = (sys.executable, "-m", "twotower.bench.transport", kind.value)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe)
    try:
        assert process.stdout is not None
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        await process.communicate()


async def _serve(kind: TransportKind) -> None:
    """Serve until stdin ends, as it does when the measuring process has ended, in whatever way."""
    torch.set_num_threads(1)
    server = RpcServer("127.0.0.1", 0)
    transports = ContextTransports(TransportConfig(kind), "127.0.0.1", CPU)
    context_pb2_grpc.add_ContextTowerServicer_to_server(_Sender(transports), server.server)
    await server.start(["twotower.internal.v1.ContextTower"])
    print(server.address, flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, ended.set)
    await ended.wait()
    await server.stop(0)
    transports.close()


if __name__ == "__main__":
    asyncio.run(_serve(TransportKind(sys.argv[1])))
