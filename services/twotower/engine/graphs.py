"""A forward as one replay: inputs at fixed places, and on a GPU one captured graph for each size of batch and context.

What a forward reads of its sessions are numbers on the device (`model.rows.PagedRows`), so that a graph serves any of
them. Batches are filled up to a power of two with rows of the pool's scratch place, which nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from twotower.model.context_tower import ContextTower
from twotower.model.denoiser_tower import DenoiserTower
from twotower.model.pool import PAGE, StatePool
from twotower.model.state import ContextState

log = logging.getLogger(__name__)

MIN_TOKENS = 512
"""The smallest bucket of context lengths; each next one is twice as long."""
WARM_UPS = 2
"""Forwards before a capture: kernels are compiled and libraries choose their algorithms outside of it."""

Out = TypeVar("Out")
Program = Callable[[Tensor, Tensor], Out]
"""Of integers (B, n) int64 and reals (B, m) fp64, a row for each session."""


class Graph(Generic[Out]):
    """One program at one size."""

    def __init__(self, program: Program[Out], ints: Tensor, reals: Tensor, *, capture: bool, memory: Any) -> None:
        """ints, reals: of rows that may be computed any number of times; they become the graph's own.

        memory: of `torch.cuda.graph_pool_handle`, shared by graphs of which one runs at a time.
        """
        self._program = program
        self._ints, self._reals = ints, reals
        self._graph: torch.cuda.CUDAGraph | None = None
        if capture:
            stream, main = torch.cuda.Stream(ints.device), torch.cuda.current_stream(ints.device)
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    program(ints, reals)
            main.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may copy states meanwhile, which is no business of this capture.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                self._out = program(ints, reals)
            self._graph = graph

    def run(self, ints: Tensor, reals: Tensor) -> Out:
        """Compute rows from the host; what is returned is overwritten by the next run."""
        self._ints.copy_(ints, non_blocking=True)
        self._reals.copy_(reals, non_blocking=True)
        if self._graph is None:
            return self._program(self._ints, self._reals)
        self._graph.replay()
        return self._out


class Graphs(Generic[Out]):
    """Graphs by size, made when a size is first met. Where capturing fails, which is logged, programs run as they are."""

    def __init__(self, device: torch.device) -> None:
        self._capture = device.type == "cuda"
        self._device = device
        self._memory: Any = None
        self._graphs: dict[Hashable, Graph[Out]] = {}
        self._pool: StatePool | None = None

    def run(self, pool: StatePool, key: Hashable, program: Program[Out], ints: Tensor, reals: Tensor, idle: Tensor) -> Out:
        """Run `program`, whose graph is known by `key` and the shapes of its rows. idle: ints of a row that nobody reads."""
        if pool is not self._pool:  # graphs hold addresses of its tensors
            self._graphs, self._pool = {}, pool
        name = (key, ints.shape, reals.shape)
        graph = self._graphs.get(name)
        if graph is None:
            graph = self._graphs[name] = self._make(program, idle.expand_as(ints), torch.ones_like(reals))
        return graph.run(ints, reals)

    def _make(self, program: Program[Out], ints: Tensor, reals: Tensor) -> Graph[Out]:
        # Copies: inputs may be views of one row, and the graph writes to its own.
        own = ints.to(self._device, copy=True).contiguous(), reals.to(self._device, copy=True)
        if self._capture:
            try:
                self._memory = self._memory or torch.cuda.graph_pool_handle()
                return Graph(program, *own, capture=True, memory=self._memory)
            except RuntimeError as error:
                log.warning("forwards are not captured as graphs, which costs speed: %s", str(error).splitlines()[0])
                self._capture = False
        return Graph(program, *own, capture=False, memory=None)


def common_pool(tower: ContextTower | DenoiserTower, states: Sequence[ContextState]) -> StatePool | None:
    """The pool of all these states, if the tower's kernels can name them by numbers there."""
    pool = states[0].pool
    return pool if tower.kernels.paged and all(state.pool is pool for state in states) else None


def batch_bucket(rows: int) -> int:
    """The power of two that a batch is filled up to."""
    return 1 << (rows - 1).bit_length()


def token_bucket(tokens: int) -> int:
    """The greatest context length of a graph that serves this one."""
    return max(MIN_TOKENS, 1 << max(0, tokens - 1).bit_length())


def state_ints(pool: StatePool, states: Sequence[ContextState], longest: int) -> Tensor:
    """Rows of integers for `state_views`: (bucket of B, 2 + pages of `longest`) int64, on the host."""
    width = longest // PAGE
    out = torch.zeros(batch_bucket(len(states)), 2 + width, dtype=torch.int64)
    out[:] = scratch_ints(pool, longest)
    slots, table, lengths = pool.numbers(states)
    rows, used = len(states), min(width, table.shape[1])
    out[:rows, 0], out[:rows, 1] = slots, lengths
    out[:rows, 2 : 2 + used] = table[:, :used]
    return out


def scratch_ints(pool: StatePool, longest: int) -> Tensor:
    """A row of `state_ints` for the scratch place, (2 + pages of `longest`,) int64."""
    scratch = pool.scratch
    out = torch.zeros(2 + longest // PAGE, dtype=torch.int64)
    out[0], out[2] = scratch.slot, scratch.pages[0]
    return out


def state_views(ints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, page table and lengths of `state_ints`, as `PagedRows` takes them."""
    return ints[:, 0].contiguous(), ints[:, 2:].int(), ints[:, 1].int()
