"""What a context counts, for Prometheus and for what it announces of itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from twotower.service.meters import Rate

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class ContextMetrics:
    """One context's, in a registry of their own. Used in the event loop only."""

    def __init__(self, registry: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """registry: of the process; None: nobody asks."""
        self.registry = registry = registry or CollectorRegistry()
        self._clock = clock
        self._leaving = Rate()
        self.prompt_tokens = Counter(
            "twotower_context_prompt_tokens", "Prompt tokens of the sessions that were opened", registry=registry
        )
        self.generation_tokens = Counter(
            "twotower_context_generation_tokens", "Tokens shown to gateways, by mode", ("mode",), registry=registry
        )
        self.prefill_seconds = Histogram(
            "twotower_context_request_prefill_time_seconds",
            "From a session's opening until its prompt is read, what it waited for memory included",
            buckets=SECONDS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "twotower_context_request_queue_time_seconds",
            "From a session's queueing until a denoiser has it",
            buckets=SECONDS,
            registry=registry,
        )
        self.commit_seconds = Histogram(
            "twotower_context_commit_seconds",
            "From a finished block's arrival until its commit is computed",
            buckets=SECONDS,
            registry=registry,
        )
        self.commit_blocks = Histogram(
            "twotower_context_commit_batch_size", "Blocks that one commit forward took", buckets=BATCH, registry=registry
        )
        self.requeued = Counter(
            "twotower_context_requeues",
            "Sessions queued again: handed_back, worker_lost, failed (on a worker), entry_lost, not_queued, resumed",
            ("why",),
            registry=registry,
        )
        self.failed = Counter(
            "twotower_context_sessions_failed", "Sessions that ended with an error, by its class", ("error",), registry=registry
        )
        self.sent_bytes = Counter(
            "twotower_context_sent_bytes",
            "Bytes of states and of commits sent, by transport",
            ("transport", "what"),
            registry=registry,
        )
        self.send_seconds = Histogram(
            "twotower_context_send_seconds",
            "Time that sending a state or a commit took, by transport",
            ("transport", "what"),
            buckets=SECONDS,
            registry=registry,
        )

    def ended(self) -> None:
        """A session is over."""
        self._leaving.add(1, self._clock())

    def sent(self, transport: str, what: str, size: int, seconds: float) -> None:
        """A transfer of `size` bytes was sent. what: state or commit."""
        self.sent_bytes.labels(transport, what).inc(size)
        self.send_seconds.labels(transport, what).observe(seconds)

    @property
    def leaving_per_s(self) -> float:
        """Sessions that ended, a second, of late."""
        return self._leaving.per_s(self._clock())


class ContextState(Collector):
    """What is true of a context at the moment of a scrape."""

    def __init__(
        self,
        metrics: ContextMetrics,
        *,
        running: Callable[[], int],
        unread: Callable[[], int],
        queued: Callable[[], int],
        slots: int,
        used_slots: Callable[[], int],
        pages: int,
        used_pages: Callable[[], int],
        forwards: Callable[[], int],
        draining: Callable[[], bool],
    ) -> None:
        self._running, self._unread, self._queued = running, unread, queued
        self._slots, self._used_slots, self._pages, self._used_pages = slots, used_slots, pages, used_pages
        self._forwards, self._draining = forwards, draining
        metrics.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """One sample of each."""
        unread, used = self._unread(), self._used_pages()
        waiting = GaugeMetricFamily(
            "twotower_context_num_requests_waiting",
            "Sessions that wait: for their prompt to be read, or for a denoiser",
            labels=("for",),
        )
        waiting.add_metric(("prefill",), unread)
        waiting.add_metric(("denoiser",), self._queued())
        yield waiting
        yield GaugeMetricFamily(
            "twotower_context_num_requests_running", "Sessions whose prompt is read", value=self._running() - unread
        )
        yield GaugeMetricFamily("twotower_context_slots", "Sessions that it holds at once", value=self._slots)
        yield GaugeMetricFamily("twotower_context_slots_used", "Sessions that have state memory", value=self._used_slots())
        yield GaugeMetricFamily("twotower_context_pages", "Pages of state memory", value=self._pages)
        yield GaugeMetricFamily("twotower_context_pages_used", "Pages of state memory in use", value=used)
        yield GaugeMetricFamily(
            "twotower_context_kv_cache_usage_perc",
            "Pages of state memory in use, as a share (1 is all of them)",
            value=used / max(1, self._pages),
        )
        yield GaugeMetricFamily("twotower_context_draining", "1 while it drains", value=self._draining())
        yield CounterMetricFamily("twotower_context_iterations", "Iterations of the tower's loop", value=self._forwards())
