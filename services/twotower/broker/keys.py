"""Names in Redis. Everything of one checkpoint lies under its identity, so that several can share a server."""

from __future__ import annotations

from twotower.request import Priority

PREFIX = "twotower"


def ready_stream(identity: str, priority: Priority) -> str:
    """Stream of sessions of one priority that wait for a denoiser."""
    return f"{PREFIX}:{identity}:ready:{priority.name.lower()}"


def replicas(identity: str, kind: str) -> str:
    """Set of the names of replicas, of which some may have died."""
    return f"{PREFIX}:{identity}:replicas:{kind}"


def replica(identity: str, kind: str, name: str) -> str:
    """One replica's announcement; it expires unless renewed."""
    return f"{PREFIX}:{identity}:replica:{kind}:{name}"


def order(identity: str, kind: str, name: str) -> str:
    """What a replica was last told to do: drain, or serve; it expires."""
    return f"{PREFIX}:{identity}:order:{kind}:{name}"


def prefix_items(identity: str, version: int) -> str:
    """What the names of all keys of the prefix cache begin with; `version`: of their payloads."""
    return f"{PREFIX}:{identity}:prefix:{version}:"
