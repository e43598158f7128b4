"""What a denoiser counts, for Prometheus and for what it announces of itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from twotower.denoiser.sickness import FinishedBlock, Sickness
from twotower.service.meters import Mean, Rate

FORWARDS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 15, 16, 24, 32)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class DenoiserMetrics:
    """One worker's, in a registry of their own. Used in the event loop only."""

    def __init__(self, registry: CollectorRegistry | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """registry: of the process; None: nobody asks."""
        self.registry = registry = registry or CollectorRegistry()
        self._clock = clock
        self.sickness = Sickness()
        self.refine_s, self.commit_s, self._row_forwards, self._block_tokens = Mean(), Mean(), Mean(), Mean()
        self._leaving = Rate()
        self.generation_tokens = Counter(
            "twotower_denoiser_generation_tokens",
            "Tokens of finished blocks, before they are cut at the end of a text",
            registry=registry,
        )
        self.block_forwards = Histogram(
            "twotower_denoiser_forwards_per_block",
            "Forwards that a finished block took; tokens a forward: generation tokens by the sum of these",
            buckets=FORWARDS,
            registry=registry,
        )
        self.out_of_steps = Counter(
            "twotower_denoiser_blocks_out_of_steps",
            "Finished blocks that took every forward they were allowed",
            registry=registry,
        )
        self.repeated = Counter(
            "twotower_denoiser_blocks_repeated", "Finished blocks that equal the one before in their session", registry=registry
        )
        self.drafts = Counter(
            "twotower_denoiser_drafts",
            "Finished drafts of speculative mode, which no other metric of blocks counts",
            registry=registry,
        )
        self.refine_seconds = Histogram(
            "twotower_denoiser_block_refine_seconds", "From a block's start to its end", buckets=SECONDS, registry=registry
        )
        self.step_seconds = Histogram(
            "twotower_denoiser_step_seconds",
            "Mean time of a block's forwards, each with all that shared it",
            buckets=SECONDS,
            registry=registry,
        )
        self.commit_seconds = Histogram(
            "twotower_denoiser_commit_wait_seconds",
            "From a block's end until the context's commit of it has arrived",
            buckets=SECONDS,
            registry=registry,
        )
        self.left = Counter(
            "twotower_denoiser_sessions_left",
            "Sessions that gave up their slot: ended by the context, handed back, failed, not_finite, refused, or link_lost",
            ("why",),
            registry=registry,
        )
        self.received_bytes = Counter(
            "twotower_denoiser_received_bytes",
            "Bytes of states and of commits that arrived, by transport",
            ("transport", "what"),
            registry=registry,
        )
        self.receive_seconds = Histogram(
            "twotower_denoiser_receive_seconds",
            "From the header of a transfer until its tensors are here, by transport",
            ("transport", "what"),
            buckets=SECONDS,
            registry=registry,
        )

    def finished(self, block: FinishedBlock, seconds: float, computing_s: float) -> None:
        """A block is finished, `seconds` after it was started; its forwards took `computing_s`."""
        now = self._clock()
        self.refine_seconds.observe(seconds)
        self.step_seconds.observe(computing_s / max(1, block.forwards))
        self.refine_s.add(seconds, now)
        if block.draft:
            self.drafts.inc()
            return
        self.sickness.add(block)
        self.generation_tokens.inc(block.tokens)
        self.block_forwards.observe(block.forwards)
        self.out_of_steps.inc(block.out_of_steps)
        self.repeated.inc(block.repeats)
        self._row_forwards.add(block.forwards, now)
        self._block_tokens.add(block.tokens, now)

    def committed(self, seconds: float) -> None:
        """A commit has arrived, `seconds` after the block was handed in."""
        self.commit_seconds.observe(seconds)
        self.commit_s.add(seconds, self._clock())

    def received(self, transport: str, what: str, size: int, seconds: float) -> None:
        """A transfer of `size` bytes has arrived. what: state or commit."""
        self.received_bytes.labels(transport, what).inc(size)
        self.receive_seconds.labels(transport, what).observe(seconds)

    def leave(self, why: str, sessions: int = 1) -> None:
        """Sessions give up their slots."""
        if sessions:
            self.left.labels(why).inc(sessions)
            self._leaving.add(sessions, self._clock())
        if why == "not_finite":
            self.sickness.not_finite(self._clock())

    @property
    def leaving_per_s(self) -> float:
        """Sessions that gave up their slots, a second, of late."""
        return self._leaving.per_s(self._clock())

    @property
    def tokens_per_forward(self) -> float:
        """Of late; 0: unknown."""
        return self._block_tokens.value / self._row_forwards.value if self._row_forwards.value else 0.0

    @property
    def sick(self) -> str:
        """Why this worker should not be trusted; empty: nothing is known against it."""
        return self.sickness.why(self._clock())

    @property
    def signs(self) -> dict[str, bool]:
        """Each sign of sickness, and whether it shows."""
        return self.sickness.signs(self._clock())


class DenoiserState(Collector):
    """What is true of a worker at the moment of a scrape."""

    def __init__(
        self,
        metrics: DenoiserMetrics,
        *,
        running: Callable[[], int],
        refining: Callable[[], int],
        slots: int,
        pages: int,
        used_pages: Callable[[], int],
        forwards: Callable[[], int],
        draining: Callable[[], bool],
    ) -> None:
        self._metrics, self._running, self._refining, self._slots = metrics, running, refining, slots
        self._pages, self._used_pages, self._forwards, self._draining = pages, used_pages, forwards, draining
        metrics.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """One sample of each."""
        running, used, refining = self._running(), self._used_pages(), self._refining()
        sick = GaugeMetricFamily(
            "twotower_denoiser_sick",
            "1 while a sign of sickness shows: tokens_per_forward near 1, not_finite logits, repeats, out_of_steps",
            labels=("sign",),
        )
        for sign, shows in self._metrics.signs.items():
            sick.add_metric((sign,), shows)
        yield sick
        yield GaugeMetricFamily("twotower_denoiser_num_requests_running", "Sessions that hold a slot", value=running)
        yield GaugeMetricFamily("twotower_denoiser_slots", "Sessions that it takes at once", value=self._slots)
        yield GaugeMetricFamily("twotower_denoiser_blocks_refining", "Blocks under way", value=refining)
        yield GaugeMetricFamily(
            "twotower_denoiser_batch_fill", "Blocks under way, as a share of the slots", value=refining / self._slots
        )
        yield GaugeMetricFamily("twotower_denoiser_pages", "Pages of state memory", value=self._pages)
        yield GaugeMetricFamily("twotower_denoiser_pages_used", "Pages of state memory in use", value=used)
        yield GaugeMetricFamily(
            "twotower_denoiser_kv_cache_usage_perc",
            "Pages of state memory in use, as a share (1 is all of them)",
            value=used / max(1, self._pages),
        )
        yield GaugeMetricFamily(
            "twotower_denoiser_tokens_per_forward",
            "Tokens a forward of late; 0: unknown",
            value=self._metrics.tokens_per_forward,
        )
        yield GaugeMetricFamily("twotower_denoiser_draining", "1 while it drains", value=self._draining())
        yield CounterMetricFamily(
            "twotower_denoiser_forwards", "Forwards of the tower, each for a batch", value=self._forwards()
        )
