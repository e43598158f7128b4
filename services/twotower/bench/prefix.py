"""What a shared prefix saves: the time to the first block of prompts with a shared prefix, against that of the first one."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from dataclasses import dataclass

from twotower.client.grpc_client import GatewayClient
from twotower.errors import Unavailable
from twotower.events import Block
from twotower.request import GenerationParams


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Rounds of prompts; those of a round share a random prefix that no other round has."""

    vocab_size: int
    block_size: int
    prefix_tokens: int
    tail_tokens: int
    requests: int
    """Requests of a round, sent one after another."""
    rounds: int
    steps: int
    seed: int

    @property
    def params(self) -> GenerationParams:
        """Parameters for a single block."""
        return GenerationParams(max_tokens=self.block_size, steps=self.steps, block_size=self.block_size, gamma=1.0)

    def prompts(self) -> list[list[list[int]]]:
        """The prompts by round and place in it. Equal seeds give equal prompts."""
        rng = random.Random(self.seed)

        def tokens(count: int) -> list[int]:
            return [rng.randrange(4, self.vocab_size) for _ in range(count)]

        return [
            [[*shared, *tokens(self.tail_tokens)] for _ in range(self.requests)]
            for shared in (tokens(self.prefix_tokens) for _ in range(self.rounds))
        ]


@dataclass(frozen=True, slots=True)
class PrefixResult:
    """Times to the first block in seconds, by round and place in it."""

    first_block_s: list[list[float]]
    alone_s: list[float]
    """The times of tails without the shared prefix: the prefill of a tail and the refinement of its block alone."""

    @property
    def alone_ms(self) -> float:
        """Median of the tails alone, ms."""
        return 1e3 * statistics.median(self.alone_s)

    @property
    def beginning(self) -> float:
        """The cost of the prefix to the second prompt, beyond its own tail and block, as a share of the first prompt's time."""
        return (self.place_ms[1] - self.alone_ms) / self.first_ms

    @property
    def place_ms(self) -> list[float]:
        """Median over the rounds for each place, ms. Only the second prompt shows that the first one's prefix repeats."""
        return [1e3 * statistics.median(times) for times in zip(*self.first_block_s, strict=True)]

    @property
    def first_ms(self) -> float:
        """Median of the first of each round, ms."""
        return self.place_ms[0]

    @property
    def following_ms(self) -> float:
        """Median of all that follow, ms."""
        return 1e3 * statistics.median(seconds for times in self.first_block_s for seconds in times[1:])

    @property
    def ratio(self) -> float:
        """Following over first: 1 where nothing is saved."""
        return self.following_ms / self.first_ms


async def shared_prefix(target: str, work: SharedPrompts) -> PrefixResult:
    """Send all prompts to a gateway, one at a time. Raises TwoTowerError."""
    ((warm_up,),) = dataclasses.replace(work, rounds=1, requests=1, seed=work.seed + 1).prompts()
    async with GatewayClient(target) as client:
        await _first_block_s(client, warm_up, work.params)  # costs of first use are not counted
        shared, alone = [], []
        for prompts in work.prompts():
            shared.append([await _first_block_s(client, prompt, work.params) for prompt in prompts])
            alone.append(await _first_block_s(client, prompts[0][work.prefix_tokens :], work.params))
        return PrefixResult(shared, alone)


async def _first_block_s(client: GatewayClient, prompt: list[int], params: GenerationParams) -> float:
    started, first = time.perf_counter(), None
    events = client.generate(
        prompt,
        max_tokens=params.max_tokens,
        block_size=params.block_size,
        steps=params.steps,
        gamma=params.gamma,
        ignore_eos=True,
    )
    async for event in events:
        if isinstance(event, Block) and first is None:
            first = time.perf_counter() - started
    if first is None:
        raise Unavailable(f"{client.target} ended a request without a block")
    return first
