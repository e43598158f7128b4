"""How many denoisers and contexts are wanted: a pure function of what is known and of what was wanted before.

Whoever scales (KEDA, an HPA, the Ray controller) follows this one decision, so that none of them needs rules of its own.

Up: on sessions that wait or run, and on the age of the oldest that waits. Down: only once fewer have been enough for a
while, and never below what the running sessions need. The use of a GPU says nothing here: a denoiser with one session
keeps its GPU as busy as one with eight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NEVER = -math.inf
EPSILON = 1e-9
"""Against quotients that rounding puts just above a whole number."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The fewest and the most replicas of a role; both hold whatever else is known."""

    least: int
    most: int

    def clamp(self, count: int) -> int:
        """The nearest allowed count."""
        return min(max(count, self.least), self.most)


@dataclass(frozen=True, slots=True)
class Policy:
    """What an operator sets."""

    denoisers: Bounds
    contexts: Bounds
    goal_s: float = 2.0
    """Seconds that a session may wait for a slot."""
    fill: float = 0.8
    """Share of the slots that is planned with; the rest is there for bursts. In (0, 1]."""
    up_every_s: float = 15.0
    """Seconds between two raises, so that a replica has time to start before one more is asked for; the first replica is
    asked for at once."""
    down_after_s: float = 120.0
    """Seconds for which fewer replicas must have been enough before fewer are wanted."""
    denoiser_slots: int = 8
    """Slots of a denoiser while none is known,"""
    context_slots: int = 64
    """and of a context."""


@dataclass(frozen=True, slots=True)
class Role:
    """What is known of one role."""

    live: int = 0
    """Replicas that take sessions; one that drains does not count."""
    slots: int = 0
    """Of all of these together."""
    running: int = 0
    """Sessions that have a slot."""
    waiting: int = 0
    """Sessions that want one, wherever they are held."""
    oldest_s: float = 0.0
    """How long the oldest of these has waited."""
    leaving_per_s: float = 0.0
    """Sessions that give up a slot, a second, over all replicas."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known at one moment."""

    now: float
    """Seconds, by a clock that does not go back."""
    denoisers: Role
    contexts: Role
    refine_s: float = 0.0
    """Mean seconds from a block's start to its end on a denoiser; 0: unknown."""
    commit_s: float = 0.0
    """Mean seconds from a block's end until the denoiser can start the session's next one; 0: unknown."""
    refining: int = 0
    """Blocks that denoisers are working on."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """How many replicas of a role are wanted."""

    count: int
    why: str


@dataclass(frozen=True, slots=True)
class RolePast:
    """What a later decision must know of earlier ones."""

    wanted: int
    raised_at: float
    needed: tuple[tuple[float, int], ...]
    """When how many were needed, within `Policy.down_after_s`, as far as nothing later needed as many."""


@dataclass(frozen=True, slots=True)
class Past:
    """Of both roles."""

    denoisers: RolePast
    contexts: RolePast


@dataclass(frozen=True, slots=True)
class Decision:
    """What is wanted now, and what the next decision must know of it."""

    denoisers: Wanted
    contexts: Wanted
    past: Past


def decide(known: Known, policy: Policy, past: Past | None = None) -> Decision:
    """How many of each role are wanted.

    past: of the last decision; None: this is the first one, which scales nothing down.
    """
    denoisers, denoisers_past = _settle(
        _needed_denoisers(known.denoisers, policy),
        known.denoisers,
        policy.denoisers,
        policy,
        known.now,
        past.denoisers if past is not None else None,
    )
    contexts, contexts_past = _settle(
        _needed_contexts(known, policy),
        known.contexts,
        policy.contexts,
        policy,
        known.now,
        past.contexts if past is not None else None,
    )
    return Decision(denoisers, contexts, Past(denoisers_past, contexts_past))


def _needed_denoisers(role: Role, policy: Policy) -> Wanted:
    each = role.slots / role.live if role.live and role.slots else policy.denoiser_slots
    return _needed(role, each, policy, "denoiser")


def _needed_contexts(known: Known, policy: Policy) -> Wanted:
    role = known.contexts
    each = role.slots / role.live if role.live and role.slots else policy.context_slots
    needed = _needed(role, each, policy, "context")
    # Denoisers that wait for commits longer than they refine starve: a context is what is missing.
    if known.refining and known.refine_s and known.commit_s > known.refine_s and needed.count <= role.live:
        why = (
            f"a block is committed in {known.commit_s:.2f} s and refined in {known.refine_s:.2f} s: denoisers wait for contexts"
        )
        return Wanted(role.live + 1, why)
    return needed


def _needed(role: Role, each: float, policy: Policy, name: str) -> Wanted:
    """What sessions need now, without bounds and the past. `each`: slots of a replica."""
    demand = role.running + role.waiting
    if not demand:
        return Wanted(0, "no session waits or runs")
    leaving = role.leaving_per_s / role.live if role.live else 0.0
    worth = each * policy.fill + leaving * policy.goal_s
    count = max(math.ceil(demand / worth - EPSILON), _floor(role, each), 1)
    why = f"{role.running} sessions run and {role.waiting} wait; a {name} takes {worth:.1f} within {policy.goal_s:g} s"
    # With no more waiting than replicas, each has one to begin with, and one more replica would not help them.
    if role.waiting > (role.live if name == "context" else 0) and role.oldest_s > policy.goal_s and count <= role.live:
        return Wanted(role.live + 1, f"a session has waited {role.oldest_s:.1f} s, and {policy.goal_s:g} s is the goal")
    return Wanted(count, why)


def _floor(role: Role, each: float) -> int:
    """Replicas without which running sessions would lose their slots."""
    return math.ceil(role.running / each - EPSILON)


def _settle(
    needed: Wanted, role: Role, bounds: Bounds, policy: Policy, now: float, past: RolePast | None
) -> tuple[Wanted, RolePast]:
    """Bounds, and the cool-downs."""
    target = bounds.clamp(needed.count)
    if past is None:
        live = bounds.clamp(role.live)
        past = RolePast(live, NEVER, ((now, live),))
    recent = [(when, count) for when, count in past.needed if when >= now - policy.down_after_s]
    count, why = max([target, *(count for _, count in recent)]), needed.why
    if count > target:
        why = f"{why}; {count} were needed within the last {policy.down_after_s:g} s"
    elif target != needed.count:
        why = f"{why}; {needed.count} would be needed, and {bounds.least} to {bounds.most} are allowed"
    if count > past.wanted > 0 and now - past.raised_at < policy.up_every_s:
        each = role.slots / role.live if role.live and role.slots else 0.0
        held = max(past.wanted, min(count, bounds.clamp(_floor(role, each) if each else 0)))
        if held < count:
            count, why = held, f"{why}; {count} only {policy.up_every_s:g} s after the last raise"
    raised = count > past.wanted
    last = max(target, count) if raised else target  # a raise stays up for the whole time, however late it came
    kept = (*((when, earlier) for when, earlier in recent if earlier > last), (now, last))
    return Wanted(count, why), RolePast(count, now if raised else past.raised_at, kept)
