"""What a stack holds when nobody asks for anything: must be the same before and after a storm."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from tests.support.processes import Up
from twotower.broker.keys import PREFIX
from twotower.broker.registry import Registry

KINDS = ("gateway", "context", "denoiser", "redis")
MORE_FILES = 4
"""Descriptors by which a process may differ from another of its kind: connections that idle for a while."""


@dataclass(slots=True)
class Remains:
    """A look at a whole stack."""

    processes: Counter[str] = field(default_factory=Counter)
    announced: Counter[str] = field(default_factory=Counter)
    """Replicas in the registry, by kind."""
    load: int = 0
    """Sessions that they say they hold."""
    queued: int = 0
    """Entries of the ready queue, delivered or not."""
    unacknowledged: int = 0
    files: dict[str, int] = field(default_factory=dict)
    """The most descriptors of a process of each kind; ``up``: of the launcher."""
    segments: dict[str, int] = field(default_factory=dict)
    """The same of shared memory segments that are open or mapped."""
    others: list[str] = field(default_factory=list)
    """Files of ours in /dev/shm."""

    def beyond(self, calm: Remains) -> list[str]:
        """What is left that was not there in the calm, or is missing; empty if nothing is."""
        said = [
            f"{name}: {value}, in the calm {was}"
            for name, value, was in (
                ("processes", dict(self.processes), dict(calm.processes)),
                ("announced", dict(self.announced), dict(calm.announced)),
                ("sessions held", self.load, 0),
                ("entries queued", self.queued, 0),
                ("entries not acknowledged", self.unacknowledged, 0),
                ("files in /dev/shm", self.others, calm.others),
            )
            if value != was
        ]
        said += _more("file descriptors", self.files, calm.files, MORE_FILES)
        return said + _more("shared memory segments", self.segments, calm.segments, 0)


async def look(up: Up, redis_url: str, identity: str) -> Remains:
    """What is there now. Raises BrokerUnavailable, RedisError, OSError where Redis is away."""
    remains = Remains()
    for kind in KINDS:
        pids = up.of_kind(kind)
        remains.processes[kind] = len(pids)
        remains.files[kind] = max(map(_files, pids), default=0)
        remains.segments[kind] = max(map(_segments, pids), default=0)
    remains.files["up"] = _files(up.process.pid)
    remains.others = sorted(name for name in os.listdir("/dev/shm") if "twotower" in name)
    redis = Redis.from_url(redis_url, decode_responses=True)
    try:
        for kind in ("context", "denoiser"):
            replicas = await Registry(redis, identity).replicas(kind)  # type: ignore[arg-type]
            remains.announced[kind] = len(replicas)
            remains.load += sum(replica.load for replica in replicas)
        async for stream in redis.scan_iter(match=f"{PREFIX}:{identity}:ready:*"):
            remains.queued += await redis.xlen(stream)
            groups: Any = await redis.xinfo_groups(stream)
            remains.unacknowledged += sum(group["pending"] for group in groups)
    finally:
        await redis.aclose()
    return remains


def environment(pid: int) -> dict[str, str]:
    """Of a process of ours."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def _more(what: str, now: Mapping[str, int], calm: Mapping[str, int], tolerated: int) -> list[str]:
    return [
        f"{what} of a {kind}: {now[kind]}, in the calm {calm.get(kind, 0)}"
        for kind in now
        if now[kind] > calm.get(kind, 0) + tolerated
    ]


def _files(pid: int) -> int:
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def _segments(pid: int) -> int:
    """Segments of ours that it has mapped or open (an inode counts once)."""
    inodes = set()
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "memfd:twotower" in line and "turns" not in line:
                inodes.add(line.split()[4])
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target = os.readlink(entry.path)
                if "memfd:twotower" in target and "turns" not in target:
                    inodes.add(str(os.stat(entry.path).st_ino))
    return len(inodes)
