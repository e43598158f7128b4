"""One Redis client per process, checked when it is made, with its errors turned into ours."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from twotower.errors import BrokerUnavailable, ConfigError

CONNECT_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 10.0
"""Longer than any blocking read asks the server to wait."""
MAX_CONNECTIONS = 16
MIN_MAJOR = 7


async def connect(url: str, *, decode: bool = True) -> Redis:
    """A client of the Redis (>= 7) or Valkey at `url`, which has answered. `decode`: values are text, not bytes.

    Close it with `await client.aclose()`. Raises ConfigError for an invalid URL, BrokerUnavailable.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            # A burst waits for a connection instead of being refused one.
            max_connections=MAX_CONNECTIONS,
            timeout=ANSWER_TIMEOUT_S,
            decode_responses=decode,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=ANSWER_TIMEOUT_S,
            # One immediate retry, for a connection that went stale; longer retries are the caller's decision.
            retry=Retry(NoBackoff(), 1),
        )
    except ValueError:  # its message may contain a part of the password
        raise ConfigError(
            f"redis: {shown_url(url)!r} is no Redis URL; give redis://HOST:PORT, rediss://HOST:PORT or unix:///PATH"
        ) from None
    client = Redis.from_pool(pool)
    try:
        with broker_errors(url):
            async with asyncio.timeout(CONNECT_TIMEOUT_S):  # a running server answers at once
                info = await client.info("server")
            version = str(info.get("valkey_version") or info.get("redis_version") or "")
            if int((re.match(r"\d+", version) or ["0"])[0]) < MIN_MAJOR:
                raise BrokerUnavailable(
                    f"Redis at {shown_url(url)} is version {version or 'unknown'}; {MIN_MAJOR} or later is needed"
                )
    except BaseException:
        await client.aclose()
        raise
    return client


def shown_url(url: str) -> str:
    """`url` without its password."""
    # By pattern, not by parsing: a password that makes the URL invalid must not be shown either.
    return re.sub(r"(password=)[^&]*", r"\1***", re.sub(r"//.*@", "//***@", url))


@contextlib.contextmanager
def broker_errors(url: str | None = None) -> Iterator[None]:
    """Turn the client's errors into BrokerUnavailable."""
    try:
        yield
    except (RedisError, OSError) as error:
        where = f" at {shown_url(url)}" if url else ""
        reason = str(error) or "no reply in time"
        refused = isinstance(error, AuthenticationError | ResponseError)
        raise BrokerUnavailable(f"Redis{where} {'refuses' if refused else 'does not answer'}: {reason}") from None
