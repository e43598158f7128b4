"""Whether a service answers: each check opens a new connection, as the next client would."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from twotower.rpc.channel import open_channel


async def answers(addresses: Mapping[str, str], timeout_s: float) -> bool:
    """Whether all addresses that the service listens on answer in time. `addresses`: those of its ready line.

    NOT_SERVING is an answer: a gateway without contexts, which a restart would not help, and a tower that drains report
    it. (A tower whose engine hangs ends by itself.)
    """
    asked = []
    if "grpc" in addresses:
        asked.append(_grpc_answers(addresses["grpc"], timeout_s))
    if "http" in addresses:
        asked.append(_http_answers(addresses["http"], timeout_s))
    return all(await asyncio.gather(*asked))


async def _grpc_answers(address: str, timeout_s: float) -> bool:
    channel = open_channel(address)
    try:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        return True
    except grpc.aio.AioRpcError:
        return False
    finally:
        await channel.close(None)


async def _http_answers(address: str, timeout_s: float) -> bool:
    """Whether `GET /healthz` is answered, with any status."""
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return (await reader.read(5)).startswith(b"HTTP/")
            finally:
                writer.close()
    return False
