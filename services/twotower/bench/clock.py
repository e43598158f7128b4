"""The time of a call on a CPU or a GPU, and the memory that is left for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

FLUSHED_BYTES = 256 << 20
"""Bytes written between calls on a GPU: more than its caches hold, and enough time for the host to launch ahead."""

LEAST_CALLS = 3
MOST_CALLS = 200


def seconds_of(call: Callable[[], object], device: torch.device, budget_s: float, *, wall: bool = False) -> float:
    """Median over the calls of about `budget_s`, at least three, after one that is not counted.

    On a GPU this is its own clock's time from a cold cache, and the call is replayed as a graph where it can be captured, so
    that small launches do not wait for the host; with `wall` it is the host's time, launches and waiting included.
    """
    call()
    _wait(device)
    if device.type != "cuda" or wall:
        return _median(lambda: _wall(call, device), budget_s)
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    replayed = _captured(call)
    return _median(lambda: _events(replayed, flushed), budget_s)


def free_bytes(device: torch.device) -> int:
    """The memory that can still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def _median(once: Callable[[], float], budget_s: float) -> float:
    taken: list[float] = []
    until = time.perf_counter() + budget_s
    while len(taken) < LEAST_CALLS or (time.perf_counter() < until and len(taken) < MOST_CALLS):
        taken.append(once())
    return statistics.median(taken)


def _wall(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _events(call: Callable[[], object], flushed: torch.Tensor) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flushed.zero_()
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a graph's replay, or the call itself if it waits for the device, which a graph cannot capture."""
    stream, main = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        call()
    main.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return call
    return graph.replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
