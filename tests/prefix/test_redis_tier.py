"""States in a real server: the same bits come out, whatever does not fit is a miss, and a server that is away is too."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from torch import Tensor

from tests.support.checkpoints import TINY, write_tiny_checkpoint
from tests.support.redis_server import embedded_redis
from twotower.broker.connection import connect
from twotower.engine.context_engine import ContextEngine
from twotower.errors import Incompatible
from twotower.model.checkpoint import Checkpoint
from twotower.model.config import ModelConfig
from twotower.model.weights import load_context_tower
from twotower.prefix.chain import ChainSpec
from twotower.prefix.redis_tier import RedisTier, RedisTierConfig
from twotower.prefix.stats import TierStats
from twotower.request import GenerationParams
from twotower.wire.frames import MESSAGE_BYTES, Key
from twotower.wire.state import fill_state, state_spec, state_tensors

CHUNK = 16
MODEL = ModelConfig.from_dict(TINY)
SPEC = ChainSpec("abc", "float32", CHUNK)
CPU = torch.device("cpu")


def tier(redis: Redis, model: ModelConfig = MODEL, **settings: float) -> RedisTier:
    config = dataclasses.replace(RedisTierConfig(), **settings)  # type: ignore[arg-type]
    return RedisTier(redis, SPEC, model, torch.float32, config, TierStats())


def state(chunks: int, seed: int = 0, model: ModelConfig = MODEL) -> dict[Key, Tensor]:
    """Random, with all its tensors but ``a``."""
    g = torch.Generator().manual_seed(seed)
    spec = state_spec(model, torch.float32, chunks * CHUNK)
    return {key: torch.randn(each.shape, generator=g) for key, each in spec.items() if key.name != "a"}


def cut(tensors: dict[Key, Tensor], chunks: int) -> dict[Key, Tensor]:
    """Keys and values of the first chunks only."""
    return {key: t[:, : chunks * CHUNK] if key.name in ("k", "v") else t for key, t in tensors.items()}


def chain(seed: int, chunks: int) -> list[bytes]:
    return SPEC.chain([seed] * (chunks * CHUNK))


def equal(one: dict[Key, Tensor] | None, other: dict[Key, Tensor]) -> bool:
    return one is not None and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


async def test_a_state_comes_back_bit_for_bit(redis: Redis) -> None:
    ours, theirs = tier(redis), tier(redis)
    links, tensors = chain(1, 5), state(3)
    assert await theirs.longest(links) == 0
    assert await ours.store(links, 3, tensors)
    assert await theirs.longest(links) == 3
    assert await theirs.longest(links[:2]) == 0
    assert equal(await theirs.load(links, 3), tensors)
    assert (theirs.stats.hits, theirs.stats.misses, theirs.stats.hit_tokens) == (1, 2, 3 * CHUNK)
    assert ours.stats.bytes > 0
    assert await theirs.longest([]) == 0


async def test_a_longer_state_adds_only_what_is_new(redis: Redis) -> None:
    ours, links, tensors = tier(redis), chain(1, 4), state(4)
    await ours.store(links, 2, cut(tensors, 2))
    two = ours.stats.bytes
    await ours.store(links, 4, tensors)
    one_more = tier(redis)
    await one_more.store(chain(2, 4), 4, state(4, seed=2))
    assert ours.stats.bytes - two == two  # a border and two chunks each
    assert one_more.stats.bytes - ours.stats.bytes > two
    assert await ours.longest(links) == 4
    assert equal(await ours.load(links, 4), tensors)
    assert equal(await ours.load(links, 2), cut(tensors, 2))


async def test_it_is_stored_once(redis: Redis) -> None:
    tiers, links = [tier(redis) for _ in range(4)], chain(1, 2)
    stored = await asyncio.gather(*(each.store(links, 2, state(2, seed)) for seed, each in enumerate(tiers)))
    assert sum(stored) == 1
    assert equal(await tiers[0].load(links, 2), state(2, stored.index(True)))
    assert not await tiers[0].store(links, 2, state(2, 9))


async def test_large_values_are_split(redis: Redis) -> None:
    model = dataclasses.replace(MODEL, mamba_num_heads=64, mamba_head_dim=64, ssm_state_size=128)
    ours, links, tensors = tier(redis, model), chain(1, 1), state(1, model=model)
    await ours.store(links, 1, tensors)
    sizes = []
    async for key in redis.scan_iter("*item:*"):
        sizes += [len(piece) for piece in await redis.lrange(key, 0, -1)]
    assert sum(sizes) > 2 * MESSAGE_BYTES
    assert max(sizes) < MESSAGE_BYTES + 1000
    assert equal(await ours.load(links, 1), tensors)


async def test_a_model_without_attention(redis: Redis) -> None:
    model = dataclasses.replace(MODEL, hybrid_override_pattern="ME")
    ours, links, tensors = tier(redis, model), chain(1, 2), state(2, model=model)
    await ours.store(links, 2, tensors)
    assert await ours.longest(links) == 2
    assert equal(await ours.load(links, 2), tensors)


async def test_a_hit_is_one_round_trip(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, links, sends = tier(redis), chain(1, 8), 0
    await ours.store(links, 8, state(8))
    send = AbstractConnection.send_packed_command

    async def counted(self: AbstractConnection, *arguments: Any, **options: Any) -> None:
        nonlocal sends
        sends += 1
        await send(self, *arguments, **options)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", counted)
    assert await ours.load(links, 8) is not None
    assert sends == 1


async def test_the_bound_holds_and_what_is_left_is_whole(redis: Redis) -> None:
    one = tier(redis)
    await one.store(chain(0, 2), 2, state(2))
    size = one.stats.bytes
    ours = tier(redis, max_bytes=3 * size + size // 2)
    for seed in range(1, 6):
        await ours.store(chain(seed, 2), 2, state(2, seed))
        assert ours.stats.bytes <= 3 * size + size // 2
        assert equal(await ours.load(chain(seed, 2), 2), state(2, seed))
    assert ours.stats.evictions["lru"] > 0
    found = [await ours.longest(chain(seed, 2)) for seed in range(6)]
    assert found == [0, 0, 0, 2, 2, 2]
    assert equal(await ours.load(chain(3, 2), 2), state(2, 3))


async def test_a_state_that_can_never_fit_is_not_written(redis: Redis) -> None:
    assert not await tier(redis, max_bytes=100).store(chain(0, 2), 2, state(2))
    assert await redis.keys("*") == []


async def test_a_payload_that_does_not_fit_is_a_miss_and_dropped(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    links = chain(1, 2)
    other = dataclasses.replace(MODEL, ssm_state_size=4)
    await tier(redis, other).store(links, 2, state(2, model=other))
    ours = tier(redis)
    assert await ours.longest(links) == 2
    assert await ours.load(links, 2) is None
    assert "'conv' of layer 0: shape" in caplog.text or "'ssm' of layer 0: shape" in caplog.text
    assert (ours.stats.hits, ours.stats.misses, ours.stats.failures) == (0, 1, 1)
    assert await ours.longest(links) == 0


@pytest.mark.parametrize("damage", [b"\xff\xff no protobuf", b""])
async def test_damage_is_a_miss(redis: Redis, damage: bytes) -> None:
    ours, links = tier(redis), chain(1, 2)
    await ours.store(links, 2, state(2))
    (key,) = await redis.keys(f"*item:state:{links[1].hex()}")
    await redis.lset(key, 0, damage)  # type: ignore[arg-type]  # bytes are taken too
    assert await ours.load(links, 2) is None
    assert await ours.longest(links) == 0


async def test_what_went_between_the_look_and_the_load_is_a_miss(redis: Redis) -> None:
    ours, links = tier(redis), chain(1, 3)
    await ours.store(links, 3, state(3))
    await redis.delete(*await redis.keys(f"*item:kv:{links[1].hex()}"))
    assert await ours.longest(links) == 3
    assert await ours.load(links, 3) is None
    assert await ours.longest(links) == 0


@pytest.mark.parametrize("change", ["missing", "shape", "dtype"])
async def test_what_is_no_such_state_is_not_stored(redis: Redis, change: str) -> None:
    tensors = state(2)
    key = next(key for key in tensors if key.name == "k")
    if change == "missing":
        del tensors[key]
    else:
        tensors[key] = tensors[key][:, :-1] if change == "shape" else tensors[key].bfloat16()
    with pytest.raises(Incompatible, match="'k' of layer 2"):
        await tier(redis).store(chain(1, 2), 2, tensors)


async def test_writes_in_the_background_are_bounded_and_end(redis: Redis) -> None:
    ours, links = tier(redis, max_stores=2), [chain(seed, 2) for seed in range(3)]
    assert [ours.store_later(each, 2, state(2)) for each in links] == [True, True, False]
    async with asyncio.timeout(10):
        while [await ours.longest(each) for each in links] != [2, 2, 0]:
            pass  # it takes a moment
    assert ours.store_later(links[2], 2, state(2))
    await ours.close()
    assert not ours._stores


@pytest.fixture
async def mute() -> AsyncIterator[Redis]:
    """A client of a server that is asked, and never answers again."""
    async with embedded_redis() as server:
        client, other = await connect(server.url, decode=False), await connect(server.url)
        await other.execute_command("CLIENT", "PAUSE", 60_000)  # type: ignore[no-untyped-call]
        yield client
        await client.aclose()
        await other.aclose()


async def test_a_server_that_does_not_answer_is_a_miss(mute: Redis, caplog: pytest.LogCaptureFixture) -> None:
    ours, links = tier(mute, lookup_s=0.05, load_s=0.05, store_s=0.05, away_s=0.0), chain(1, 2)
    for _ in range(2):
        assert await ours.longest(links) == 0
        assert await ours.load(links, 2) is None
        assert not await ours.store(links, 2, state(2))
    assert ours.stats.failures == 6
    assert caplog.text.count("does without Redis") == 1


async def test_a_server_that_is_away_is_let_alone_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with embedded_redis() as server:
        client = await connect(server.url, decode=False)
        ours, links = tier(client, away_s=3600.0), chain(1, 2)
        await ours.store(links, 2, state(2))
        assert server.process is not None
        await server.process.stop(5.0)
        for _ in range(3):
            assert await ours.longest(links) == 0
        assert (ours.stats.failures, ours.stats.misses) == (1, 3)
        await server.restart()
        assert await ours.longest(links) == 0  # not asked yet
        ours._away_until = 0.0
        assert await ours.longest(links) == 0  # it came back empty
        assert await ours.store(links, 2, state(2))
        assert await ours.longest(links) == 2
        await client.aclose()
    assert [record.message for record in caplog.records if record.name.endswith("redis_tier")][1:] == [
        "the prefix cache uses Redis again"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_a_prompt_goes_on_from_another_replicas_state(redis: Redis, tmp_path: Path, dtype: torch.dtype) -> None:
    """One replica reads a prompt and stores its state; another goes on from there, and computes the same bits."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path))
    spec = ChainSpec(checkpoint.identity, str(dtype).removeprefix("torch."), CHUNK)
    prompt = torch.randint(4, 96, (5 * CHUNK + 3,), generator=torch.Generator().manual_seed(0)).tolist()
    links, border = spec.chain(prompt), 4 * CHUNK

    def replica() -> tuple[ContextEngine, RedisTier]:
        engine = ContextEngine(load_context_tower(checkpoint, dtype, CPU))
        return engine, RedisTier(redis, spec, checkpoint.config, dtype, RedisTierConfig(), TierStats())

    first, its_tier = replica()
    session = first.open("first", prompt, GenerationParams())
    first.prefill(session, border)
    assert await its_tier.store(links, 4, dict(state_tensors(session.state, first.decay_rates)))

    second, its_tier = replica()
    chunks = await its_tier.longest(links)
    assert chunks * CHUNK == border
    tensors = await its_tier.load(links, chunks)
    assert tensors is not None
    other = second.open("second", prompt, GenerationParams())
    rates = {Key("a", i): rate for i, rate in second.decay_rates.items()}
    fill_state(other.state, tensors | rates, border)
    for engine, going in ((first, session), (second, other)):
        engine.prefill(going, going.prefill_left)
        engine.commit([(going, list(range(16)))])
    ours, theirs = (dict(state_tensors(each.state, first.decay_rates)) for each in (session, other))
    assert equal(ours, theirs)
