"""The limit on open files: every connection of a service is one, and the usual soft limit is 1,024."""

from __future__ import annotations

import resource

ENOUGH = 1 << 20
"""The highest limit that is asked for: some systems have no hard limit, and others refuse a higher one."""


def allow_many_files() -> int:
    """Raise this process's limit on open files as far as permitted; returns the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft
