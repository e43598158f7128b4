"""A context service without a model: a real gRPC server that speaks context.proto, announced in Redis like a real one."""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from twotower.broker.connection import connect
from twotower.broker.heartbeat import heartbeat
from twotower.broker.registry import Registry, Replica, ReplicaKind
from twotower.internal.v1 import context_pb2, context_pb2_grpc, scoring_pb2, scoring_pb2_grpc
from twotower.request import FinishReason, Mode, cut_block
from twotower.rpc.server import RpcServer
from twotower.rpc.signals import stop_requested
from twotower.tasks import until_stopped
from twotower.v1 import inference_pb2
from twotower.wire.params import FINISH_TO_PB, params_from_pb

FORWARDS = 3
"""What each block is said to have taken; an AR token takes 1."""

CAPACITY = 1 << 20


async def at_once(block: int) -> None:
    """Give every block without waiting."""


class SimulatedContext(context_pb2_grpc.ContextTowerServicer, scoring_pb2_grpc.ScoringServicer):
    """Gives the tokens of `tokens_of` in blocks, from where the request says it is. Logprobs count the tokens' places.

    `before`: awaited before each block of a call, with the block's number in that call, and before the end;
    what it raises ends the call.
    """

    def __init__(self, before: Callable[[int], Awaitable[None]] = at_once) -> None:
        self.before = before
        self.running = 0
        self.most_running = 0
        """Sessions that were open at one time."""
        self.server: RpcServer | None = None

    def tokens_of(self, request: context_pb2.OpenRequest) -> Sequence[int]:
        """All tokens of a session: the prompt, again and again."""
        generated = params_from_pb(request.params).max_tokens
        return tuple(itertools.islice(itertools.cycle(request.prompt.ids), generated))

    async def start(self) -> str:
        """Serve; returns the address."""
        self.server = RpcServer("127.0.0.1", 0)
        context_pb2_grpc.add_ContextTowerServicer_to_server(self, self.server.server)
        scoring_pb2_grpc.add_ScoringServicer_to_server(self, self.server.server)
        await self.server.start(["twotower.internal.v1.ContextTower"])
        return self.server.address

    async def stop(self) -> None:
        """Break all calls and close the port."""
        if self.server is not None:
            await self.server.stop(0)
            self.server = None

    async def Open(self, request: context_pb2.OpenRequest, context: Any) -> AsyncIterator[context_pb2.SessionEvent]:
        """Stream one session."""
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async for event in self._events(request):
                yield event
        finally:
            self.running -= 1

    async def Score(self, request: scoring_pb2.ScoreRequest, context: Any) -> AsyncIterator[scoring_pb2.ScoredTokens]:
        """Log probabilities that count the prompt's tokens, the likeliest of which are the first ids."""
        top = [inference_pb2.TopLogprob(token_id=token, logprob=-1.0) for token in range(request.top)]
        places = range(1, len(request.prompt.ids))
        told = [inference_pb2.TokenLogprobs(logprob=-float(place), top=top) for place in places]
        yield scoring_pb2.ScoredTokens(logprobs=told)

    async def _events(self, request: context_pb2.OpenRequest) -> AsyncIterator[context_pb2.SessionEvent]:
        params, script = params_from_pb(request.params), list(self.tokens_of(request))
        generated, number = request.generated, 0
        size = 1 if params.mode is Mode.AR else params.block_size
        reason: FinishReason | None = None
        while reason is None:
            await self.before(number)
            tokens = (script[generated:] + [0] * size)[:size]
            shown, reason = cut_block(tokens, params.max_tokens - generated, params.eos_token_ids)
            generated += len(shown)
            number += 1
            forwards = 1 if params.mode is Mode.AR else FORWARDS
            block = context_pb2.SessionBlock(token_ids=shown, forwards=forwards)
            if params.logprobs is not None:
                places = range(generated - len(shown), generated)
                block.logprobs.extend(inference_pb2.TokenLogprobs(logprob=-float(place)) for place in places)
            yield context_pb2.SessionEvent(block=block)
        await self.before(number)
        yield context_pb2.SessionEvent(end=context_pb2.SessionEnd(finish_reason=FINISH_TO_PB[reason]))


def paced(pace_s: float) -> Callable[[int], Awaitable[None]]:
    """A block every `pace_s`, each session at moments of its own."""

    async def before(block: int) -> None:
        await asyncio.sleep(pace_s * (random.random() if block == 0 else 1))

    return before


async def run(redis_url: str, identity: str, pace_s: float) -> None:
    """Serve as the only context, with a denoiser that is only announced, until SIGTERM."""
    stop = stop_requested()
    redis = await connect(redis_url)
    context = SimulatedContext(paced(pace_s))
    address, registry = await context.start(), Registry(redis, identity)

    def describe(kind: ReplicaKind) -> Replica:
        load = context.running if kind == "context" else 0
        return Replica(kind, f"simulated-{kind}", address, identity, load=load, capacity=CAPACITY)

    kinds: tuple[ReplicaKind, ...] = ("context", "denoiser")
    for kind in kinds:
        await registry.announce(describe(kind))
    beats = [asyncio.create_task(heartbeat(registry, functools.partial(describe, kind))) for kind in kinds]
    print(f"ready grpc={address}", flush=True)
    await until_stopped(stop, *beats)
    await context.stop()
    await redis.aclose()
    print(f"at most {context.most_running} sessions at one time", file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A context service without a model, for load tests of gateways.")
    parser.add_argument("--redis", required=True)
    parser.add_argument("--identity", required=True)
    parser.add_argument("--pace", type=float, required=True, help="seconds a block")
    options = parser.parse_args()
    asyncio.run(run(options.redis, options.identity, options.pace))
