"""The denoiser's process: it must end when it can no longer work, whoever waits for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.towers import towers
from twotower.broker.connection import connect
from twotower.broker.registry import Registry
from twotower.denoiser import main
from twotower.denoiser.config import DenoiserConfig
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.request import GenerationParams
from twotower.settings.build import build


async def test_a_worker_whose_forwards_fail_ends_and_is_announced_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(main, "_first_use", lambda engine: None)

    def broken(self: DenoiserEngine, blocks: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(DenoiserEngine, "step", broken)
    async with towers(path) as stack:
        url = stack.redis_url
        config = build(DenoiserConfig, checkpoint=path, redis_url=url, dtype="float32", device="cpu")
        working = asyncio.create_task(main.run(config))
        calls = [stack.open([5, 6, 7, i], GenerationParams(max_tokens=16)) for i in range(4)]
        with pytest.raises(RuntimeError, match="illegal memory access"):
            await asyncio.wait_for(working, 20)
        redis = await connect(url)
        assert not await Registry(redis, stack.checkpoint.identity).replicas("denoiser")
        await redis.aclose()
        for call in calls:
            call.cancel()  # type: ignore[attr-defined]  # gRPC's, as the stubs do not say
