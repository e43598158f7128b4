"""Forwards at fixed places, for batches filled up with rows that nobody reads: what a GPU captures, run as it is here."""

from __future__ import annotations

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.graphs import Graphs, batch_bucket, state_ints, state_views, token_bucket
from twotower.engine.session import Session
from twotower.model.checkpoint import Checkpoint
from twotower.model.pool import PAGE, PoolSize, StatePool
from twotower.model.weights import load_context_tower, load_denoiser_tower
from twotower.request import GenerationParams, Mode

pytest.importorskip("triton")

from twotower_kernels.triton.common import interpreted

pytestmark = pytest.mark.device

DEVICE = torch.device("cpu" if interpreted() else "cuda")
PROMPTS = (5, 70, 9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), hybrid_override_pattern="ME*"))


@pytest.fixture(scope="module")
def engines(checkpoint: Checkpoint) -> dict[bool, tuple[ContextEngine, DenoiserEngine]]:
    """By whether forwards are replays."""
    place = (torch.float32, DEVICE)
    context = load_context_tower(checkpoint, *place, kernels="triton")
    denoiser = load_denoiser_tower(checkpoint, *place, kernels="triton")
    return {
        graphs: (ContextEngine(context, graphs=graphs), DenoiserEngine(denoiser, graphs=graphs)) for graphs in (False, True)
    }


def _sessions(engine: ContextEngine, params: GenerationParams) -> list[Session]:
    pool = StatePool(engine.tower.config, engine.tower.dtype, DEVICE, PoolSize(4, 10))
    for tensor in pool.kv.values():
        tensor.fill_(float("nan"))
    spare = pool.acquire(PAGE)
    sessions = []
    for i, length in enumerate(PROMPTS):
        prompt = [4 + (7 * i + j) % 90 for j in range(length)]
        sessions.append(engine.open(str(i), prompt, params, state=pool.acquire(length + 64)))
        while sessions[-1].prefill_left:
            engine.prefill(sessions[-1], 32)
    pool.release(spare)
    return sessions


def test_buckets() -> None:
    assert [batch_bucket(n) for n in (1, 2, 3, 4, 5, 16, 17)] == [1, 2, 4, 4, 8, 16, 32]
    assert [token_bucket(n) for n in (0, 1, 512, 513, 1024, 1025)] == [512, 512, 512, 1024, 1024, 2048]


def test_rows_that_fill_up_a_batch_are_of_the_scratch_place(checkpoint: Checkpoint) -> None:
    pool = StatePool(checkpoint.config, torch.float32, torch.device("cpu"), PoolSize(4, 10))
    states = [pool.acquire(PAGE + 1) for _ in range(3)]
    states[1].length = 9
    slots, table, lengths = state_views(state_ints(pool, states, 512))
    assert (slots.tolist(), lengths.tolist()) == ([0, 1, 2, 4], [0, 9, 0, 0])
    assert table[:, :2].tolist() == [[0, 1], [2, 3], [4, 5], [10, 0]]
    assert table.shape == (4, 512 // PAGE)


def test_blocks_and_commits_are_the_same(engines: dict[bool, tuple[ContextEngine, DenoiserEngine]]) -> None:
    params = GenerationParams(steps=1, temperature=0.6, seed=4)
    seen = {}
    for graphs, (context, denoiser) in engines.items():
        sessions = _sessions(context, params)
        deltas, written = [], []
        for _ in range(2):  # the second time with graphs that are there
            blocks = [denoiser.start(params, session.state, session.generated) for session in sessions]
            while running := [block for block in blocks if not block.done]:
                denoiser.step(running)
            tokens = [block.tokens.tolist() for block in blocks]
            written.append([session.emit(block) for session, block in zip(sessions, tokens, strict=True)])
            deltas.append(context.commit(list(zip(sessions, tokens, strict=True))))
        changes = [change for together in deltas for delta in together for change in delta.layers.values()]
        factors = [getattr(change, name) for change in changes for name in change.__slots__]
        state = [t for s in sessions for layer in s.state.mamba.values() for t in (layer.conv, layer.ssm)]
        kv = [t for s in sessions for layer in s.state.kv.values() for t in layer.slice(0, s.state.length)]
        seen[graphs] = (written, [s.state.length for s in sessions], [*factors, *state, *kv])
    assert seen[True][:2] == seen[False][:2]
    for got, expected in zip(seen[True][2], seen[False][2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_ar_steps_are_the_same(engines: dict[bool, tuple[ContextEngine, DenoiserEngine]]) -> None:
    params = GenerationParams(mode=Mode.AR)
    seen = {}
    for graphs, (context, _) in engines.items():
        sessions = _sessions(context, params)
        seen[graphs] = [context.decode(sessions), context.decode(sessions), context.decode(sessions[1:])]
    assert seen[True] == seen[False]


def test_rows_that_sort_the_vocabulary_or_ask_for_logprobs(engines: dict[bool, tuple[ContextEngine, DenoiserEngine]]) -> None:
    asked = [
        GenerationParams(gamma=0.9, steps=2, logprobs=2),
        GenerationParams(gamma=0.9, steps=2, temperature=0.8, top_k=3, seed=9),
        GenerationParams(gamma=0.9, steps=2),
    ]
    seen = {}
    for graphs, (context, denoiser) in engines.items():
        sessions = _sessions(context, asked[0])
        blocks = [denoiser.start(params, session.state, 0) for params, session in zip(asked, sessions, strict=True)]
        denoiser.step([blocks[0], blocks[2]])
        denoiser.step(blocks)
        seen[graphs] = [block.tokens.tolist() for block in blocks], [len(block.logprobs) for block in blocks]
    assert seen[True] == seen[False]
    assert seen[True][1][0] == 16


def test_graphs_belong_to_a_pool_and_a_size(checkpoint: Checkpoint) -> None:
    made: list[tuple[int, ...]] = []

    def program(ints: torch.Tensor, reals: torch.Tensor) -> int:
        made.append((id(ints), *ints.shape))
        return int(ints.sum())

    cpu = torch.device("cpu")
    pools = [StatePool(checkpoint.config, torch.float32, cpu, PoolSize(1, 1)) for _ in range(2)]
    graphs: Graphs[int] = Graphs(cpu)

    def run(pool: StatePool, rows: int, value: int, key: str = "a") -> int:
        ints = torch.full((rows, 2), value)
        return graphs.run(
            pool, key, program, ints, torch.zeros(rows, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
        )

    assert [run(pools[0], 2, 3), run(pools[0], 2, 5), run(pools[0], 4, 1)] == [12, 20, 8]
    assert made[0] == made[1] != made[2]  # the same buffers for the same size
    run(pools[0], 2, 1, "b")
    assert made[3] != made[0]
    run(pools[1], 2, 1)
    assert len(graphs._graphs) == 1  # those of the other pool's addresses are gone


def test_sizes_are_bounded_and_made_ahead(checkpoint: Checkpoint) -> None:
    cpu = torch.device("cpu")
    pool = StatePool(checkpoint.config, torch.float32, cpu, PoolSize(1, 1))
    idle = torch.zeros(2, dtype=torch.int64)
    graphs: Graphs[int] = Graphs(cpu, limit=2)

    def program(ints: torch.Tensor, reals: torch.Tensor) -> int:
        return id(ints)

    def run(rows: int, *, common: bool = True) -> int:
        ints, reals = torch.ones(rows, 2, dtype=torch.int64), torch.zeros(rows, 1, dtype=torch.float64)
        return graphs.run(pool, "a", program, ints, reals, idle, common=common)

    assert graphs.prepare(pool, "a", program, 1, 1, idle) is False  # made, but a CPU captures nothing
    kept = {rows: run(rows) for rows in (1, 2)}
    run(3, common=False)
    assert {rows: run(rows) for rows in (2, 1)} == kept  # 1 ran last
    run(4)
    assert run(1) == kept[1]
    assert len(graphs._graphs) == 2


def test_engines_warm_up_at_scratch_places(engines: dict[bool, tuple[ContextEngine, DenoiserEngine]]) -> None:
    params = GenerationParams(steps=1)
    context, denoiser = engines[True]
    sessions = _sessions(context, params)
    before = [[t.clone() for layer in s.state.mamba.values() for t in (layer.conv, layer.ssm)] for s in sessions]
    pool = sessions[0].state.pool
    assert pool is not None
    made = context.warm_up(pool, batches=(4,), contexts=(512,)) + denoiser.warm_up(pool, batches=(4,), contexts=(512,))
    assert (made.sizes, made.captured > 0) == (3, DEVICE.type == "cuda")
    assert "3 sizes in" in str(made)
    for session, kept in zip(sessions, before, strict=True):
        assert all(map(torch.equal, kept, (t for layer in session.state.mamba.values() for t in (layer.conv, layer.ssm))))
    blocks = [denoiser.start(params, session.state, 0) for session in sessions]
    denoiser.step(blocks)
    context.commit([(session, block.tokens.tolist()) for session, block in zip(sessions, blocks, strict=True)])
    assert [session.state.length for session in sessions] == [length + 16 for length in PROMPTS]
    assert [len(engine._graphs._graphs) for engine in (denoiser,) if engine._graphs is not None] == [1]


def test_a_block_of_another_size_makes_no_graph(engines: dict[bool, tuple[ContextEngine, DenoiserEngine]]) -> None:
    seen = {}
    for graphs, (context, denoiser) in engines.items():
        params = GenerationParams(steps=1, block_size=5)
        sessions = _sessions(context, params)
        blocks = [denoiser.start(params, session.state, 0) for session in sessions]
        denoiser.step(blocks)
        tokens = [block.tokens.tolist() for block in blocks]
        deltas = context.commit(list(zip(sessions, tokens, strict=True)))
        seen[graphs] = tokens, [delta.length for delta in deltas]
        if denoiser._graphs is not None:
            made = [name for name in denoiser._graphs._graphs if isinstance(name, tuple) and name[-1] == 5 + 3]
            assert made == []
    assert seen[True] == seen[False]
