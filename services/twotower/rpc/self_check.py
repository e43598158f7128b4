"""A server's check of its own port: a process whose port does not answer must not go on as if it served."""

from __future__ import annotations

import asyncio
import logging
import os
import threading

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from twotower.errors import ServiceFailed
from twotower.rpc.address import join_address
from twotower.rpc.channel import open_channel

log = logging.getLogger(__name__)

PERIOD_S = 1.0
TIMEOUT_S = 2.0
"""The limit of one try. A process that was suspended for a while fails one try only."""
TRIES = 3
"""Failed tries in a row after which the port is given up. A refused connection fails at once, so that this takes about 3 s."""

END_S = 10.0
"""How long a process whose port was given up may take for an orderly end, which remains of a gRPC server may hold up."""

ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}

NO_ANSWER = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


async def answers(host: str, port: int) -> bool:
    """Whether a new connection to the server that listens on `host:port` gets any answer."""
    async with open_channel(join_address(ANY_HOST.get(host, host), port)) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return error.code() not in NO_ANSWER
        return True


async def watch_port(host: str, port: int) -> None:
    """Dial every second until cancelled. Raises ServiceFailed when the port no longer answers."""
    failed = 0
    while failed < TRIES:
        await asyncio.sleep(PERIOD_S)
        if await answers(host, port):
            failed = 0
        else:
            failed += 1
            log.warning("the port %s does not answer this process itself (%d of %d)", join_address(host, port), failed, TRIES)
    log.error("the port %s is given up: this process ends", join_address(host, port))
    raise ServiceFailed(f"the gRPC port {join_address(host, port)} no longer answers")


def end_soon() -> None:
    """End this process with status 1 after `END_S`, unless it has ended by then."""
    ending = threading.Timer(END_S, os._exit, (1,))
    ending.daemon = True
    ending.start()
