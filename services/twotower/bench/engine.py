"""The engine in one process: the gain of batching, and the baseline of the plain way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from twotower.bench.baseline import generate_plain, make_plain
from twotower.bench.workload import Result, Workload
from twotower.engine.batch import generate_batch
from twotower.engine.local import LocalEngine


@dataclass(frozen=True, slots=True)
class EngineRow:
    """The results of one batch size."""

    batch: int
    result: Result


def run_batch(engine: LocalEngine, workload: Workload, requests: int, batch: int) -> Result:
    """Run `requests` requests, at most `batch` at a time."""
    params, prompts = workload.params, workload.prompts(requests)
    list(generate_batch(engine.context, engine.denoiser, prompts[:batch], params, batch))  # costs of first use are not counted
    result = Result(requests)
    for done in generate_batch(engine.context, engine.denoiser, prompts, params, batch):
        result.count(len(done.token_ids))
        result.first_block_s.append(done.first_block_s)
        result.latency_s.append(done.seconds)
    result.stop()  # requests of one length end at once, so that no batch is partly filled
    return result


def engine_rows(
    engine: LocalEngine, workload: Workload, batches: Sequence[int], rounds: int, report: Callable[[EngineRow], None]
) -> list[EngineRow]:
    """Measure every batch size, over `rounds` times as many requests."""
    rows = []
    for batch in batches:
        rows.append(EngineRow(batch, run_batch(engine, workload, rounds * batch, batch)))
        report(rows[-1])
    return rows


def plain_result(checkpoint: Path, workload: Workload, requests: int, *, dtype: str, device: str, threads: int) -> Result:
    """The baseline at batch 1, on the same weights; its tokens are counted alike, but not checked here."""
    return run_plain(plain_engine(checkpoint, dtype=dtype, device=device, threads=threads), workload, requests)


def plain_engine(checkpoint: Path, *, dtype: str, device: str, threads: int) -> LocalEngine:
    """An engine whose towers are the baseline's."""
    engine = LocalEngine(checkpoint, dtype=dtype, device=device, threads=threads)
    make_plain(engine.context.tower)
    make_plain(engine.denoiser.tower)
    return engine


def run_plain(plain: LocalEngine, workload: Workload, requests: int) -> Result:
    """Run `requests` requests, one after another, on a `plain_engine`."""
    prompts = workload.prompts(requests)
    generate_plain(plain.context, plain.denoiser, prompts[0], workload.params)
    result = Result(requests)
    for prompt in prompts:
        result.count(len(generate_plain(plain.context, plain.denoiser, prompt, workload.params)))
    result.stop()
    return result


def open_engine(
    checkpoint: Path, *, dtype: str, device: str, threads: int, kernels: str = "auto", compiled: bool = False
) -> LocalEngine:
    """An engine with both towers, ready to be timed."""
    engine = LocalEngine(checkpoint, dtype=dtype, device=device, threads=threads, kernels=kernels)
    engine.context.tower.compiled = engine.denoiser.tower.compiled = compiled
    torch.set_num_threads(threads)
    return engine
