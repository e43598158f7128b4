"""Captured graphs on a CUDA device: pools that follow one another, captures that fail, sizes that are made ahead."""

from __future__ import annotations

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.graphs import Graphs, batch_buckets, token_buckets
from twotower.model.checkpoint import Checkpoint
from twotower.model.pool import PoolSize, StatePool
from twotower.model.weights import load_context_tower, load_denoiser_tower
from twotower.request import GenerationParams

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), hybrid_override_pattern="ME*"))


def _pool(checkpoint: Checkpoint) -> StatePool:
    return StatePool(checkpoint.config, torch.float32, CUDA, PoolSize(4, 12))


def _ints(rows: int, value: int) -> torch.Tensor:
    return torch.full((rows, 2), value)


def _run(graphs: Graphs[torch.Tensor], pool: StatePool, rows: int, value: int, key: str = "sum", common: bool = True) -> int:
    def program(ints: torch.Tensor, reals: torch.Tensor) -> torch.Tensor:
        if key == "word":
            ints.sum().item()  # a word from the device: no capture survives it
        return ints.sum() + reals.sum().long()

    reals = torch.zeros(rows, 1, dtype=torch.float64)
    idle = torch.zeros(2, dtype=torch.int64)
    return int(graphs.run(pool, key, program, _ints(rows, value), reals, idle, common=common))


def _captured(graphs: Graphs[torch.Tensor]) -> list[bool]:
    return [graph.captured for graph in graphs._graphs.values()]


def test_a_new_pool_is_captured_again(checkpoint: Checkpoint) -> None:
    graphs: Graphs[torch.Tensor] = Graphs(CUDA)
    for value in (3, 5, 7):
        pool = _pool(checkpoint)
        assert [_run(graphs, pool, rows, value) for rows in (2, 4, 2)] == [4 * value, 8 * value, 4 * value]
        assert _captured(graphs) == [True, True]


def test_a_capture_that_fails_costs_its_own_size(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    graphs: Graphs[torch.Tensor] = Graphs(CUDA)
    pool = _pool(checkpoint)
    assert _run(graphs, pool, 2, 1) == 4
    assert _run(graphs, pool, 2, 3, "word") == 12
    assert "are not captured" in caplog.text
    assert _run(graphs, pool, 4, 1) == 8
    assert _captured(graphs) == [True, False, True]
    assert [_run(graphs, pool, 2, 2), _run(graphs, pool, 2, 2, "word"), _run(graphs, pool, 4, 2)] == [8, 8, 16]


def test_the_first_capture_fails_and_the_next_does_not(checkpoint: Checkpoint) -> None:
    graphs: Graphs[torch.Tensor] = Graphs(CUDA)
    pool = _pool(checkpoint)
    assert _run(graphs, pool, 2, 3, "word") == 12
    assert _run(graphs, pool, 2, 3) == 12
    assert _captured(graphs) == [False, True]


def test_no_more_graphs_than_allowed(checkpoint: Checkpoint) -> None:
    graphs: Graphs[torch.Tensor] = Graphs(CUDA, limit=1)
    pool = _pool(checkpoint)
    assert [_run(graphs, pool, rows, 1) for rows in (1, 2, 4, 1)] == [2, 4, 8, 2]
    assert _captured(graphs) == [True]
    assert _run(graphs, pool, 8, 1, common=False) == 16
    assert _captured(graphs) == [True]


def test_warm_engines_make_no_graph_later(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    place = (torch.float32, CUDA)
    context = ContextEngine(load_context_tower(checkpoint, *place, kernels="triton"))
    denoiser = DenoiserEngine(load_denoiser_tower(checkpoint, *place, kernels="triton"))
    pool = _pool(checkpoint)
    before = pool.acquire(64)
    batches, contexts = batch_buckets(3), token_buckets(600)
    made = [engine.warm_up(pool, batches=batches, contexts=contexts) for engine in (context, denoiser)]
    assert [(one.sizes, one.captured) for one in made] == [(12, 12), (6, 6)]
    assert before.length == 0

    def never(*args: object) -> None:
        raise AssertionError("a size was met that was not made ahead")

    monkeypatch.setattr(Graphs, "_make", never)
    params = GenerationParams(steps=2)
    sessions = [context.open(str(i), [5, 6, 7 + i], params, state=pool.acquire(80)) for i in range(3)]
    for session in sessions:
        context.prefill(session, 8)
    blocks = [denoiser.start(params, session.state, 0) for session in sessions]
    while running := [block for block in blocks if not block.done]:
        denoiser.step(running)
    context.commit([(session, block.tokens.tolist()) for session, block in zip(sessions, blocks, strict=True)])
    assert {session.state.length for session in sessions} == {19}
