"""The loops of both towers in the test's own thread, an iteration at a time, with tiny towers in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from twotower.context import messages as context_messages
from twotower.context.loop import ContextLoop
from twotower.context.prefixes import PrefixCache
from twotower.denoiser import messages as denoiser_messages
from twotower.denoiser.loop import DenoiserLoop
from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.effort import Times
from twotower.engine.pacing import Load, Pacing
from twotower.engine.progress import Progress
from twotower.model.checkpoint import Checkpoint
from twotower.model.pool import PoolSize, StatePool
from twotower.model.weights import load_context_tower, load_denoiser_tower
from twotower.prefix.chain import ChainSpec
from twotower.prefix.redis_tier import RedisTier

CPU = torch.device("cpu")
CHUNK = 16


class Eager(Pacing):
    """Never waits, not even without work: iterations are the test's to call."""

    def patience(self, load: Load) -> float | None:
        return 0.0


class FixedTimes(Times):
    """What a machine takes that no neighbour slows down: nothing that is measured changes it."""

    def measured(self, name: str, seconds: float) -> None:
        pass


class TinyTowers:
    """Loads the towers once; makes any number of loops with them."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint.open(path)
        self.context = load_context_tower(self.checkpoint, torch.float32, CPU)
        self.denoiser = load_denoiser_tower(self.checkpoint, torch.float32, CPU)

    def pool(self, slots: int, pages: int | None = None) -> StatePool:
        return StatePool(self.checkpoint.config, torch.float32, CPU, PoolSize(slots, pages or 8 * slots))

    def context_loop(
        self,
        deliver: Callable[[Sequence[context_messages.ContextResult]], object],
        pool: StatePool,
        *,
        max_waiting: int = 64,
        prefix_bytes: int = 1 << 24,
        redis: RedisTier | None = None,
        budget: int = 64,
        pacing: Pacing | None = None,
    ) -> ContextLoop:
        engine = ContextEngine(self.context)
        spec = ChainSpec(self.checkpoint.identity, "float32", CHUNK)
        prefixes = PrefixCache(spec, prefix_bytes, engine.decay_rates, redis)
        return ContextLoop(
            engine,
            pool,
            prefixes,
            deliver,
            chunk=CHUNK,
            budget=budget,
            max_waiting=max_waiting,
            progress=Progress(60),
            pacing=pacing or Eager(),
        )

    def denoiser_loop(
        self, deliver: Callable[[Sequence[denoiser_messages.DenoiserResult]], object], pool: StatePool
    ) -> DenoiserLoop:
        return DenoiserLoop(DenoiserEngine(self.denoiser), pool, deliver, progress=Progress(60), pacing=Eager())
