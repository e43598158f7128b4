"""Whole sessions over each transport: real gRPC, real Redis, a context, and workers that come and go."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.towers import towers
from tests.support.transports import mapped_segments
from tests.support.waiting import until
from twotower.engine.local import LocalEngine
from twotower.request import GenerationParams
from twotower.transport.config import TransportKind

PARAMS = GenerationParams(max_tokens=60, gamma=0.3)
LONG = GenerationParams(max_tokens=240, gamma=0.9)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def local(path: Path) -> LocalEngine:
    return LocalEngine(path, threads=1)


@pytest.mark.parametrize("kind", list(TransportKind))
async def test_many_sessions(path: Path, local: LocalEngine, kind: TransportKind) -> None:
    async with towers(path, transport=kind) as stack:
        for _ in range(2):
            stack.start_worker()
        requests = [([5 + i, 7], dataclasses.replace(PARAMS, temperature=0.5, seed=i)) for i in range(10)]
        results = await asyncio.gather(*(stack.generate(*request) for request in requests))
        assert [tokens for tokens, _ in results] == [local.generate(*request).token_ids for request in requests]
        assert (mapped_segments() > 0) == (kind is TransportKind.SHM)
    assert mapped_segments() == 0


@pytest.mark.parametrize("kind", list(TransportKind))
async def test_a_worker_that_vanishes(path: Path, local: LocalEngine, kind: TransportKind) -> None:
    async with towers(path, transport=kind) as stack:
        first = stack.start_worker()
        tokens: list[int] = []
        blocks = 0
        async for event in stack.open([5, 6, 7], LONG):
            if not event.HasField("block"):
                continue
            tokens += event.block.token_ids
            if blocks == 2:
                await first.die()
                stack.start_worker(transport=kind)
            blocks += 1
        assert tokens == local.generate([5, 6, 7], LONG).token_ids
        await until(lambda: len(stack.service.sessions) == 0)


async def test_workers_with_different_transports_serve_one_context(path: Path, local: LocalEngine) -> None:
    async with towers(path) as stack:
        workers = [stack.start_worker(slots=1, transport=kind) for kind in TransportKind]
        requests = [([5 + i, 7], dataclasses.replace(LONG, max_tokens=160, seed=i)) for i in range(6)]
        running = [asyncio.create_task(stack.generate(*request)) for request in requests]
        await until(lambda: all(worker.worker.load for worker in workers))
        results = await asyncio.gather(*running)
        assert [tokens for tokens, _ in results] == [local.generate(*request).token_ids for request in requests]
