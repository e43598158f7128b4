"""The environment variable that names Redis. Apart from the client, so that the command line can be read without it."""

from __future__ import annotations

REDIS_VARIABLE = "TWOTOWER_REDIS_URL"
"""Its password need not be on a command line then, which every user of the machine can read."""
