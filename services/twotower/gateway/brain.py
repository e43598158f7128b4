"""What this gateway knows of the pool, what that makes it want, and both as `/v1/pool` shows them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twotower.broker.registry import Replica
from twotower.gateway.scaling import Bounds, Decision, Known, Policy, Role, Wanted, decide


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All replicas as they last announced themselves, those that drain too."""

    gateways: Sequence[Replica] = ()
    contexts: Sequence[Replica] = ()
    denoisers: Sequence[Replica] = ()


def known_of(snapshot: Snapshot, now: float) -> Known:
    """What the decision is made from."""
    gateways, contexts, denoisers = snapshot.gateways, snapshot.contexts, snapshot.denoisers
    working = [denoiser for denoiser in denoisers if denoiser.refine_s and denoiser.load]
    return Known(
        now=now,
        denoisers=Role(
            live=_live(denoisers),
            slots=sum(denoiser.capacity for denoiser in denoisers),
            running=sum(denoiser.load for denoiser in denoisers),
            waiting=sum(replica.waiting for replica in (*contexts, *gateways)),
            oldest_s=max((replica.oldest_s for replica in (*contexts, *gateways)), default=0.0),
            leaving_per_s=sum(denoiser.leaving_per_s for denoiser in denoisers),
        ),
        contexts=Role(
            live=_live(contexts),
            slots=sum(context.capacity for context in contexts),
            running=sum(context.load - context.unread for context in contexts),
            waiting=sum(replica.unread for replica in (*contexts, *gateways)),
            oldest_s=max((replica.unread_s for replica in (*contexts, *gateways)), default=0.0),
            leaving_per_s=sum(context.leaving_per_s for context in contexts),
        ),
        refine_s=_mean([denoiser.refine_s for denoiser in working]),
        commit_s=_mean([denoiser.commit_s for denoiser in working]),
        refining=sum(denoiser.refining for denoiser in denoisers),
    )


class Brain:
    """Decides again whenever the replicas were looked at, and remembers what it must between decisions."""

    def __init__(self, policy: Policy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._snapshot = Snapshot()
        self._decision: Decision | None = None

    def look(self, snapshot: Snapshot) -> Decision:
        """Decide from what the registry says now. Not to be called while it does not answer: that says nothing about need."""
        self._snapshot = snapshot
        self._remember_slots(snapshot)
        past = self._decision.past if self._decision is not None else None
        self._decision = decide(known_of(snapshot, self._clock()), self._policy, past)
        return self._decision

    def body(self) -> dict[str, Any]:
        """Of `GET /v1/pool`."""
        snapshot, decision = self._snapshot, self._decision
        known = known_of(snapshot, self._clock())
        roles = {
            "denoisers": _role(
                known.denoisers, self._policy.denoisers, decision.denoisers if decision else None, snapshot.denoisers
            ),
            "contexts": _role(
                known.contexts, self._policy.contexts, decision.contexts if decision else None, snapshot.contexts
            ),
        }
        roles["denoisers"] |= {"refining": known.refining, "refine_s": known.refine_s, "commit_s": known.commit_s}
        gateways = {
            "replicas": [_replica(gateway) for gateway in snapshot.gateways],
            "live": _live(snapshot.gateways),
            "load": sum(gateway.load for gateway in snapshot.gateways),
        }
        return {"object": "pool", **roles, "gateways": gateways}

    def _remember_slots(self, snapshot: Snapshot) -> None:
        """Remember how many slots a replica has, for the time when there is none."""
        if slots := _slots_of_one(snapshot.denoisers):
            self._policy = dataclasses.replace(self._policy, denoiser_slots=slots)
        if slots := _slots_of_one(snapshot.contexts):
            self._policy = dataclasses.replace(self._policy, context_slots=slots)


def _role(role: Role, bounds: Bounds, wanted: Wanted | None, replicas: Sequence[Replica]) -> dict[str, Any]:
    return {
        "wanted": bounds.clamp(role.live) if wanted is None else wanted.count,
        "why": "the replicas have not been looked at yet" if wanted is None else wanted.why,
        "min": bounds.least,
        "max": bounds.most,
        "live": role.live,
        "draining": sum(replica.draining for replica in replicas),
        "slots": role.slots,
        "load": role.running,
        "waiting": role.waiting,
        "oldest_s": role.oldest_s,
        "leaving_per_s": role.leaving_per_s,
        "replicas": [_replica(replica) for replica in replicas],
    }


def _replica(replica: Replica) -> dict[str, Any]:
    about = {
        "name": replica.name,
        "address": replica.address,
        "slots": replica.capacity,
        "load": replica.load,
        "draining": replica.draining,
        "drained": replica.draining and replica.load == 0,
    }
    if replica.kind == "denoiser":
        about |= {"tokens_per_forward": replica.tokens_per_forward, "sick": replica.sick or None}
    return about


def _slots_of_one(replicas: Sequence[Replica]) -> int:
    """Of a replica that takes sessions, on average; 0: there is none."""
    return round(_mean([replica.capacity for replica in replicas if replica.capacity > 0]))


def _live(replicas: Sequence[Replica]) -> int:
    return sum(replica.capacity > 0 for replica in replicas)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
