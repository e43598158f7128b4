"""A forward as one replay: inputs at fixed places, and on a GPU one captured graph for each size of batch and context.

What a forward reads of its sessions are numbers on the device (`model.rows.PagedRows`), so that a graph serves any of
them. Batches are filled up to a power of two with rows of the pool's scratch place, which nobody reads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
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
MOST_GRAPHS = 256
"""Graphs of one tower; of more, the one that has not run for longest is dropped. Each holds some megabytes of a GPU."""

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

    @property
    def captured(self) -> bool:
        """Whether `run` is a replay."""
        return self._graph is not None

    def run(self, ints: Tensor, reals: Tensor) -> Out:
        """Compute rows from the host; what is returned is overwritten by the next run."""
        self._ints.copy_(ints, non_blocking=True)
        self._reals.copy_(reals, non_blocking=True)
        if self._graph is None:
            return self._program(self._ints, self._reals)
        self._graph.replay()
        return self._out


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What was made ready before the first request."""

    sizes: int
    """Graphs that were made, each of a batch, a block and a context."""
    captured: int
    """Of these, how many replay; the others run launch by launch, since they could not be captured."""
    seconds: float

    def __add__(self, other: WarmUp) -> WarmUp:
        return WarmUp(self.sizes + other.sizes, self.captured + other.captured, self.seconds + other.seconds)

    def __str__(self) -> str:
        return f"{self.sizes} sizes in {self.seconds:.1f} s, {self.captured} of them captured"


class Graphs(Generic[Out]):
    """Graphs by size. A size is made when it is first met, or before (`prepare`); a capture that fails costs that size only."""

    def __init__(self, device: torch.device, limit: int = MOST_GRAPHS) -> None:
        """limit: how many are kept."""
        self._capture = device.type == "cuda"
        self._device = device
        self._limit = limit
        self._memory: Any = None
        self._graphs: dict[Hashable, Graph[Out]] = {}
        """The one that ran last is the last."""
        self._pool: StatePool | None = None

    def run(
        self,
        pool: StatePool,
        key: Hashable,
        program: Program[Out],
        ints: Tensor,
        reals: Tensor,
        idle: Tensor,
        *,
        common: bool = True,
    ) -> Out:
        """Run `program`, whose graph is known by `key` and the shapes of its rows. idle: ints of a row that nobody reads.

        common: whether it is of a size that is worth a graph, which is the caller's to bound: a capture takes a second, and
        what clients can ask for must not cause one at every request. Others run launch by launch.
        """
        if not common:
            return program(ints.to(self._device), reals.to(self._device))
        return self._graph(pool, key, program, ints.shape[0], reals.shape[1], idle).run(ints, reals)

    def prepare(self, pool: StatePool, key: Hashable, program: Program[Out], rows: int, reals: int, idle: Tensor) -> bool:
        """Make the graph that `run` would for so many rows of so many reals; returns whether it replays."""
        return self._graph(pool, key, program, rows, reals, idle).captured

    def _graph(self, pool: StatePool, key: Hashable, program: Program[Out], rows: int, reals: int, idle: Tensor) -> Graph[Out]:
        if pool is not self._pool:  # graphs hold addresses of its tensors
            self._graphs, self._pool = {}, pool
        name = (key, rows, idle.shape[0], reals)
        graph = self._graphs.pop(name, None)
        if graph is None:
            while len(self._graphs) >= self._limit:
                del self._graphs[next(iter(self._graphs))]
            graph = self._make(name, program, idle.repeat(rows, 1), torch.ones(rows, reals, dtype=torch.float64))
        self._graphs[name] = graph
        return graph

    def _make(self, name: Hashable, program: Program[Out], ints: Tensor, reals: Tensor) -> Graph[Out]:
        ints, reals = ints.to(self._device), reals.to(self._device)
        if self._capture:
            if self._memory is None or not any(graph.captured for graph in self._graphs.values()):
                # The memory of a handle is given back with the last graph that used it, and the handle is dead from then on.
                self._memory = torch.cuda.graph_pool_handle()
            try:
                return Graph(program, ints, reals, capture=True, memory=self._memory)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                self._memory = None  # the allocator may still hold it for the capture that failed
                log.warning("forwards of size %s are not captured as a graph, which costs speed: %s", name, reason)
        return Graph(program, ints, reals, capture=False, memory=None)


def warm_up(sizes: Iterable[Callable[[], bool]]) -> WarmUp:
    """Prepare each size, and time it all; what each returns: whether it replays."""
    started = time.perf_counter()
    captured = [prepare() for prepare in sizes]
    return WarmUp(len(captured), sum(captured), time.perf_counter() - started)


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


def batch_buckets(most: int) -> list[int]:
    """Every `batch_bucket` of up to `most` rows."""
    return [1 << i for i in range(batch_bucket(most).bit_length())]


def token_buckets(most: int) -> list[int]:
    """Every `token_bucket` of up to `most` tokens."""
    buckets = [MIN_TOKENS]
    while buckets[-1] < most:
        buckets.append(2 * buckets[-1])
    return buckets


def state_ints(pool: StatePool, states: Sequence[ContextState], longest: int) -> Tensor:
    """Rows of integers for `state_views`: (bucket of B, 2 + pages of `longest`) int64, on the host."""
    width = longest // PAGE
    out = np.empty((batch_bucket(len(states)), 2 + width), dtype=np.int64)  # numpy: torch takes microseconds an element
    out[:] = scratch_ints(pool, longest).numpy()
    for row, state in zip(out, states, strict=False):
        place = state.place
        assert place is not None
        used = min(width, len(place.pages))
        row[0], row[1], row[2] = place.slot, state.length, 0
        row[2 : 2 + used] = place.pages[:used]
    return torch.from_numpy(out)


def scratch_ints(pool: StatePool, longest: int) -> Tensor:
    """A row of `state_ints` for the scratch place, (2 + pages of `longest`,) int64."""
    scratch = pool.scratch
    out = torch.zeros(2 + longest // PAGE, dtype=torch.int64)
    out[0], out[2] = scratch.slot, scratch.pages[0]
    return out


def state_views(ints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, page table and lengths of `state_ints`, as `PagedRows` takes them."""
    return ints[:, 0].contiguous(), ints[:, 2:].int(), ints[:, 1].int()
