"""A service that holds thousands of connections needs as many open files; the usual soft limit is 1,024."""

from __future__ import annotations

import resource

ENOUGH = 1 << 20
"""Some systems have no hard limit, and a limit beyond this is refused by others."""


def allow_many_files() -> int:
    """Raise this process's limit on open files as far as it may; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft
