"""The driver's word on a GPU."""

from __future__ import annotations

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from twotower.service.gpu_metrics import offer_gpu_metrics


def test_without_a_gpu_there_are_none() -> None:
    registry = CollectorRegistry()
    assert not offer_gpu_metrics(torch.device("cpu"), registry)
    assert generate_latest(registry) == b""


def test_without_a_driver_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    """A tower does not fail for want of metrics."""
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    registry = CollectorRegistry()
    assert not offer_gpu_metrics(torch.device("cuda"), registry)
    assert "no metrics of the GPU" in caplog.text
    assert generate_latest(registry) == b""


@pytest.mark.gpu
def test_a_gpu() -> None:
    registry = CollectorRegistry()
    held = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    assert offer_gpu_metrics(torch.device("cuda", torch.cuda.current_device()), registry)
    samples = {sample.name: sample.value for family in registry.collect() for sample in family.samples}
    assert samples["twotower_gpu_memory_total_bytes"] > samples["twotower_gpu_memory_used_bytes"] >= held.numel()
    assert 0 <= samples["twotower_gpu_utilization_ratio"] <= 1
    assert samples["twotower_gpu_power_watts"] > 0
    assert samples["twotower_gpu_temperature_celsius"] > 0
