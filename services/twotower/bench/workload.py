"""The requests of benchmarks, and how they are timed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from twotower.request import GenerationParams


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one shape, with random prompts.

    With random weights no token is confident, so refinement always takes all its `steps`: 5 steps make 3.2 tokens a
    forward in blocks of 16, like the published model on arithmetic.
    """

    vocab_size: int
    prompt_tokens: int = 64
    max_tokens: int = 64
    steps: int = 5
    block_size: int = 16
    seed: int = 0

    @property
    def params(self) -> GenerationParams:
        """Parameters without an end-of-sequence token, so that every request writes `max_tokens`."""
        return GenerationParams(max_tokens=self.max_tokens, steps=self.steps, block_size=self.block_size, gamma=1.0)

    def prompts(self, count: int) -> list[list[int]]:
        """Random prompts; equal seeds give equal prompts."""
        rng = random.Random(self.seed)
        return [[rng.randrange(4, self.vocab_size) for _ in range(self.prompt_tokens)] for _ in range(count)]


@dataclass(slots=True)
class Result:
    """The result of a run over some requests, which begins when this object is made."""

    requests: int = 0
    tokens: int = 0
    """Tokens until `stop`."""
    seconds: float = 0.0
    """Time from the beginning to `stop`; 0 while the run lasts."""
    first_block_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)

    def count(self, tokens: int) -> None:
        """Count tokens that have just arrived."""
        if not self.seconds:
            self.tokens += tokens

    def stop(self) -> None:
        """End the time over which throughput is measured; only the first call counts."""
        self.seconds = self.seconds or time.perf_counter() - self._started

    @property
    def tokens_per_s(self) -> float:
        """Throughput of all requests."""
        return self.tokens / self.seconds

    @property
    def ttft_ms(self) -> float:
        """Median time to the first block, ms."""
        return 1e3 * statistics.median(self.first_block_s)

    def quantile_ms(self, percent: int) -> float:
        """A percentile of the latency, ms."""
        return 1e3 * quantile(self.latency_s, percent)


def quantile(values: Sequence[float], percent: int) -> float:
    """A percentile with linear interpolation; a single value is returned itself."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
