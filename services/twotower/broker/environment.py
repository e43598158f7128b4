"""The environment variable that names Redis. Apart from the client, so that the command line can be read without it."""

from __future__ import annotations

from twotower.service.config import REDIS_VARIABLE

__all__ = ["REDIS_VARIABLE"]
