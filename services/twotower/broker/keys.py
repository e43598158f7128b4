"""Names of keys in Redis. Those of one checkpoint contain its identity, so that several checkpoints can share a server."""

from __future__ import annotations

from twotower.request import Priority

PREFIX = "twotower"


def ready_stream(identity: str, priority: Priority) -> str:
    """The stream of sessions of one priority that wait for a denoiser."""
    return f"{PREFIX}:{identity}:ready:{priority.name.lower()}"


def replicas(identity: str, kind: str) -> str:
    """The set of the names of replicas, some of which may have died."""
    return f"{PREFIX}:{identity}:replicas:{kind}"


def replica(identity: str, kind: str, name: str) -> str:
    """One replica's announcement, which expires unless it is renewed."""
    return f"{PREFIX}:{identity}:replica:{kind}:{name}"


def order(identity: str, kind: str, name: str) -> str:
    """What a replica was last told to do: drain, or serve; it expires."""
    return f"{PREFIX}:{identity}:order:{kind}:{name}"


def prefix_items(identity: str, version: int) -> str:
    """The prefix of all keys of the prefix cache; `version`: that of their payloads."""
    return f"{PREFIX}:{identity}:prefix:{version}:"
