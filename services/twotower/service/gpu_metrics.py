"""What the driver says of the GPU that a tower computes on, by NVML; nothing where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

log = logging.getLogger(__name__)


def offer_gpu_metrics(device: torch.device, registry: CollectorRegistry) -> bool:
    """Offer the metrics of a CUDA device; whether there is one that NVML knows. What NVML lacks is logged, and no error."""
    if device.type != "cuda":
        return False
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception as error:
        log.warning("no metrics of the GPU: %s", error)
        return False
    registry.register(GpuMetrics(pynvml, handle, uuid))
    return True


class GpuMetrics(Collector):
    """One GPU's, read when they are asked for. A value that a card does not give is left out."""

    def __init__(self, nvml: Any, handle: Any, uuid: str) -> None:
        self._nvml, self._handle, self._uuid = nvml, handle, uuid

    def collect(self) -> Iterator[Metric]:
        """One sample of each."""
        utilization = GaugeMetricFamily(
            "twotower_gpu_utilization_ratio", "Share of time in which some kernel ran; says nothing of load", labels=("gpu",)
        )
        used = GaugeMetricFamily("twotower_gpu_memory_used_bytes", "Memory in use, by whomever", labels=("gpu",))
        total = GaugeMetricFamily("twotower_gpu_memory_total_bytes", "Memory of the GPU", labels=("gpu",))
        power = GaugeMetricFamily("twotower_gpu_power_watts", "Power drawn", labels=("gpu",))
        temperature = GaugeMetricFamily("twotower_gpu_temperature_celsius", "Temperature of the chip", labels=("gpu",))
        nvml, handle = self._nvml, self._handle
        reads: tuple[tuple[GaugeMetricFamily, Callable[[], float]], ...] = (
            (utilization, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            (used, lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
            (total, lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total),
            (power, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            (temperature, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        )
        for family, read in reads:
            try:
                family.add_metric((self._uuid,), read())
            except nvml.NVMLError:
                continue
            yield family
