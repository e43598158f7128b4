from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.support.redis_server import embedded_redis
from twotower.broker.connection import connect


@pytest.fixture
async def redis() -> AsyncIterator[Redis]:
    """A client of a fresh server, which gives bytes."""
    async with embedded_redis() as server:
        client = await connect(server.url, decode=False)
        yield client
        await client.aclose()
