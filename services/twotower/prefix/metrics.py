"""The prefix cache's counters for Prometheus, collected on each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from twotower.prefix.stats import PrefixStats


class PrefixMetrics(Collector):
    """Reports `stats` to the scrapers of `registry`."""

    def __init__(self, stats: PrefixStats, registry: CollectorRegistry) -> None:
        self._stats = stats
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The metrics, with one sample of each per tier."""
        lookups = CounterMetricFamily("twotower_prefix_lookups", "Prefixes looked for", labels=("tier", "result"))
        tokens = CounterMetricFamily("twotower_prefix_hit_tokens", "Prompt tokens that were not read again", labels=("tier",))
        held = GaugeMetricFamily("twotower_prefix_bytes", "Bytes held", labels=("tier",))
        ratio = GaugeMetricFamily("twotower_prefix_hit_ratio", "Hits among lookups since the start", labels=("tier",))
        evicted = CounterMetricFamily(
            "twotower_prefix_evictions", "Entries that made room for others", labels=("tier", "segment")
        )
        failed = CounterMetricFamily("twotower_prefix_failures", "Times the tier could not be used", labels=("tier",))
        for tier, stats in self._stats.tiers.items():
            lookups.add_metric((tier, "hit"), stats.hits)
            lookups.add_metric((tier, "miss"), stats.misses)
            tokens.add_metric((tier,), stats.hit_tokens)
            held.add_metric((tier,), stats.bytes)
            ratio.add_metric((tier,), stats.hit_ratio)
            failed.add_metric((tier,), stats.failures)
            for segment, count in stats.evictions.items():
                evicted.add_metric((tier, segment), count)
        yield from (lookups, tokens, held, ratio, evicted, failed)
