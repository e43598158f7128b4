"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from twotower.errors import InvalidArgument, Overloaded, TwoTowerError, Unavailable
from twotower.request import DraftUse

LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

ROUND_BUCKETS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 32, 64)

COMPLETED = "completed"
CANCELLED = "cancelled"

_OUTCOMES: tuple[tuple[type[TwoTowerError], str], ...] = (
    (InvalidArgument, "invalid"),
    (Overloaded, "overloaded"),
    (Unavailable, "unavailable"),
)


def outcome_of(error: BaseException) -> str:
    """The `outcome` label of a request that ended with `error`; an end without one of ours is the client's leaving."""
    for cls, outcome in _OUTCOMES:
        if isinstance(error, cls):
            return outcome
    return "failed" if isinstance(error, Exception) else CANCELLED


class Metrics:
    """The gateway's metrics, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "twotower_gateway_requests", "Requests ended, by mode and outcome", ("mode", "outcome"), registry=registry
        )
        self.in_flight = Gauge("twotower_gateway_requests_in_flight", "Requests being served", registry=registry)
        self.prompt_tokens = Counter("twotower_gateway_prompt_tokens", "Prompt tokens accepted", registry=registry)
        self.completion_tokens = Counter("twotower_gateway_completion_tokens", "Tokens generated", ("mode",), registry=registry)
        self.forwards = Counter(
            "twotower_gateway_forwards", "Forwards that generated tokens took", ("mode",), registry=registry
        )
        self.drafted = Counter(
            "twotower_gateway_drafted_tokens",
            "Tokens that denoisers drafted in speculative mode, by position in the draft",
            ("position",),
            registry=registry,
        )
        self.accepted = Counter(
            "twotower_gateway_accepted_tokens",
            "Drafted tokens that became text, by position in the draft",
            ("position",),
            registry=registry,
        )
        self.round_tokens = Histogram(
            "twotower_gateway_round_tokens",
            "Tokens that a round of speculative mode wrote",
            buckets=ROUND_BUCKETS,
            registry=registry,
        )
        self.context_forwards = Counter(
            "twotower_gateway_context_forwards",
            "Forwards of the context tower in speculative mode: verifications and AR steps",
            registry=registry,
        )
        self.reopened = Counter(
            "twotower_gateway_sessions_reopened", "Sessions moved to another context replica", registry=registry
        )
        self.routed = Counter(
            "twotower_gateway_sessions_routed",
            "Sessions opened on a context, by why it was chosen: its load, or the prompt's prefix it holds",
            ("by",),
            registry=registry,
        )
        self.expected_prefix_tokens = Counter(
            "twotower_gateway_expected_prefix_tokens",
            "Prompt tokens that the contexts chosen were thought to hold",
            registry=registry,
        )
        self.first_block_s = Histogram(
            "twotower_gateway_time_to_first_block_seconds",
            "From acceptance to the first block",
            ("mode",),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.duration_s = Histogram(
            "twotower_gateway_request_duration_seconds",
            "From acceptance to the last block, of completed requests",
            ("mode",),
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.contexts = Gauge("twotower_gateway_contexts_live", "Contexts that announce themselves", registry=registry)
        self.denoisers = Gauge("twotower_gateway_denoisers_live", "Denoisers that announce themselves", registry=registry)
        self.denoisers_wanted = Gauge(
            "twotower_denoisers_wanted", "Denoisers that are wanted, for whoever scales them", registry=registry
        )
        self.contexts_wanted = Gauge(
            "twotower_contexts_wanted", "Contexts that are wanted, for whoever scales them", registry=registry
        )
        self.held = Gauge(
            "twotower_gateway_requests_held",
            "Requests that wait for a first replica, by its role",
            ("role",),
            registry=registry,
        )

    def count_round(self, use: DraftUse, tokens: int) -> None:
        """A round of speculative mode, or an AR step in it, wrote so many tokens."""
        if use.context_forwards:
            self.context_forwards.inc(use.context_forwards)
        if use.drafted:
            self.round_tokens.observe(tokens)
        for position in range(1, use.drafted + 1):
            self.drafted.labels(position).inc()
            if position <= use.accepted:
                self.accepted.labels(position).inc()

    def count_route(self, expected_tokens: int) -> None:
        """A session was opened on a context that is thought to hold so many tokens of its prompt."""
        self.routed.labels("prefix" if expected_tokens else "load").inc()
        self.expected_prefix_tokens.inc(expected_tokens)
