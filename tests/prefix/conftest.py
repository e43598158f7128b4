from __future__ import annotations

import shutil
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.support.redis_server import debian_redis, embedded_redis
from twotower.broker.connection import connect


@pytest.fixture(params=["embedded", "debian"])
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    """A client that gives bytes, of a fresh server; once of each kind that is here."""
    if request.param == "embedded":
        async with embedded_redis() as server:
            client = await connect(server.url, decode=False)
            yield client
            await client.aclose()
        return
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on the PATH")
    with debian_redis() as url:
        client = await connect(url, decode=False)
        yield client
        await client.aclose()
