"""What Prometheus is told of the prefix cache."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from twotower.prefix.metrics import PrefixMetrics
from twotower.prefix.stats import PrefixStats


def test_every_tier_is_told_as_it_is_when_asked() -> None:
    stats, registry = PrefixStats.of("device", "redis"), CollectorRegistry()
    PrefixMetrics(stats, registry)
    assert registry.get_sample_value("twotower_prefix_hit_ratio", {"tier": "redis"}) == 0
    device = stats.tiers["device"]
    device.hits, device.misses, device.hit_tokens, device.bytes, device.failures = 3, 1, 640, 77, 2
    device.evictions["probation"] += 5
    samples = {
        ("twotower_prefix_lookups_total", "result", "hit"): 3,
        ("twotower_prefix_lookups_total", "result", "miss"): 1,
        ("twotower_prefix_evictions_total", "segment", "probation"): 5,
        ("twotower_prefix_hit_tokens_total", "tier", "device"): 640,
        ("twotower_prefix_bytes", "tier", "device"): 77,
        ("twotower_prefix_hit_ratio", "tier", "device"): 0.75,
        ("twotower_prefix_failures_total", "tier", "device"): 2,
    }
    for (name, label, value), expected in samples.items():
        assert registry.get_sample_value(name, {"tier": "device", label: value}) == expected
    assert b'twotower_prefix_lookups_total{result="miss",tier="redis"} 0.0' in generate_latest(registry)
