"""The other end of a transport as a process of its own, to be killed: `python -m tests.support.transport_peer ROLE KIND`.

Messages go over stdin and stdout, in hex, a line each. As a worker, it tells its offer, takes the choice, and then
never receives; as a context, it takes an offer, tells its choice, tells of a transfer, and with `dist` never sends it.
"""

from __future__ import annotations

import asyncio
import sys

import torch

from tests.support.transports import CONTEXT_ADDRESS, CPU, WORKER_PEER, sent
from twotower.transport.config import TransportConfig
from twotower.transport.dist import DistOutlet
from twotower.transport.ends import ContextTransports, WorkerTransports
from twotower.internal.v1 import context_pb2
from twotower.wire.frames import Key


async def _main(role: str, kind: str) -> None:
    config = TransportConfig.of(kind)
    if role == "worker":
        worker = WorkerTransports(config, CPU)
        _tell(worker.offer.SerializeToString())
        choice = context_pb2.TransportChoice.FromString(await _hear())
        worker.attach(choice, CONTEXT_ADDRESS)
        for pair in worker._pairs._pairs.values():
            await pair.group.joined()
        _tell(b"attached")
    else:
        context = ContextTransports(config, "127.0.0.1", CPU)
        offer = context_pb2.TransportOffer.FromString(await _hear())
        outlet, choice = context.attach(offer, WORKER_PEER)
        _tell(choice.SerializeToString())
        if isinstance(outlet, DistOutlet):
            await outlet._pair.group.joined()
        messages = sent(outlet, [(Key("ssm", 0), torch.arange(1000, dtype=torch.float32))])
        _tell((await anext(messages)).SerializeToString())
    await asyncio.Event().wait()


async def _hear() -> bytes:
    return bytes.fromhex((await asyncio.to_thread(sys.stdin.readline)).strip())


def _tell(message: bytes) -> None:
    print(message.hex(), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
