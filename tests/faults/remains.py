"""What a stack holds when nobody asks for anything: must be the same before and after a storm."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from tests.support.processes import Up
from twotower.broker.keys import PREFIX
from twotower.broker.registry import Registry

KINDS = ("gateway", "context", "denoiser", "redis")
MORE_FILES = 32
"""Descriptors by which a process may differ from what it had in the calm: two pools of connections to Redis, which grow with
what was asked for at once, and never beyond 16 each. (On Redis' own side these are everybody's, and not looked at.)"""
SEGMENTS = 16
"""Shared memory segments of a context and a worker: up to two for each of its slots, kept to be used again."""


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
    """The most descriptors of a process of each kind, less those of segments; ``up``: of the launcher."""
    segments: dict[str, int] = field(default_factory=dict)
    """The most shared memory segments that a process of each kind has open or mapped."""
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
        for kind, files in self.files.items():
            if kind != "redis" and files > calm.files[kind] + MORE_FILES:
                said.append(f"file descriptors of a {kind}: {files}, in the calm {calm.files[kind]}")
        for kind, peer in (("context", "denoiser"), ("denoiser", "context")):
            if self.segments[kind] > SEGMENTS * self.processes[peer]:
                said.append(f"shared memory segments of a {kind}: {self.segments[kind]}, in the calm {calm.segments[kind]}")
        return said


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


def _files(pid: int) -> int:
    count = 0
    with suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                count += "memfd:twotower" not in os.readlink(entry.path)
    return count


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
