"""The other end of a transport as a process of its own, to be killed: `python -m tests.support.transport_peer ROLE KIND`.

Messages go over stdin and stdout, in hex, a line each. As a worker, it prints its offer, takes the choice, and then
never receives; as a context, it takes an offer, prints its choice, announces a transfer, and with `dist` never sends it.
"""

from __future__ import annotations

import asyncio
import sys

import torch

from tests.support.transports import CONTEXT_ADDRESS, CPU, WORKER_PEER, header
from twotower.internal.v1 import link_pb2
from twotower.transport.config import TransportConfig
from twotower.transport.dist import DistInlet, DistOutlet
from twotower.transport.ends import ContextTransports, WorkerTransports
from twotower.wire.frames import Key


async def _main(role: str, kind: str) -> None:
    config = TransportConfig.of(kind)
    if role == "worker":
        worker = WorkerTransports(config, CPU)
        _print(worker.offer.SerializeToString())
        inlet = worker.attach(link_pb2.TransportChoice.FromString(await _line()), CONTEXT_ADDRESS)
        if isinstance(inlet, DistInlet):
            await inlet.group.joined()
        _print(b"attached")
        await asyncio.Event().wait()
    context = ContextTransports(config, "127.0.0.1", CPU)
    outlet, choice = context.attach(link_pb2.TransportOffer.FromString(await _line()), WORKER_PEER)
    _print(choice.SerializeToString())
    if isinstance(outlet, DistOutlet):
        await outlet.group.joined()

    async def write(message: link_pb2.ContextMessage) -> None:
        _print(message.SerializeToString())
        await asyncio.Event().wait()  # as far as it ever comes

    await outlet.send([(Key("ssm", 0), torch.arange(1000, dtype=torch.float32))], header, write)


async def _line() -> bytes:
    return bytes.fromhex((await asyncio.to_thread(sys.stdin.readline)).strip())


def _print(message: bytes) -> None:
    print(message.hex(), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
