"""A context service without a model: a real gRPC server that speaks context.proto and gives the tokens it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from twotower.request import FinishReason, Mode, cut_block
from twotower.rpc.server import RpcServer
from twotower.v1 import context_pb2, context_pb2_grpc, inference_pb2
from twotower.wire.params import FINISH_TO_PB, params_from_pb

FORWARDS = 3
"""What each block is said to have taken; an AR token takes 1."""


async def at_once(block: int) -> None:
    """Give every block without waiting."""


class ScriptedContext(context_pb2_grpc.ContextTowerServicer):
    """Gives the tokens of `script` in blocks, from where the request says it is. Logprobs count the tokens' places.

    `before`: awaited before each block of a call, with the block's number in that call, and before the end;
    what it raises ends the call.
    """

    def __init__(self, script: Sequence[int], before: Callable[[int], Awaitable[None]] = at_once) -> None:
        self.script = list(script)
        self.before = before
        self.opened: list[context_pb2.OpenRequest] = []
        self.running = 0
        self.most_running = 0
        self.left = asyncio.Event()
        """A call was ended by its client."""
        self.server: RpcServer | None = None

    async def start(self) -> str:
        """Serve; returns the address."""
        self.server = RpcServer("127.0.0.1", 0)
        context_pb2_grpc.add_ContextTowerServicer_to_server(self, self.server.server)
        await self.server.start(["twotower.v1.ContextTower"])
        return self.server.address

    async def stop(self) -> None:
        """Break all calls and close the port."""
        if self.server is not None:
            await self.server.stop(0)
            self.server = None

    async def Open(self, request: context_pb2.OpenRequest, context: Any) -> AsyncIterator[context_pb2.SessionEvent]:
        self.opened.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async for event in self._events(request):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise
        finally:
            self.running -= 1

    async def _events(self, request: context_pb2.OpenRequest) -> AsyncIterator[context_pb2.SessionEvent]:
        params = params_from_pb(request.params)
        generated, number = request.generated, 0
        size = 1 if params.mode is Mode.AR else params.block_size
        reason: FinishReason | None = None
        while reason is None:
            await self.before(number)
            tokens = (self.script[generated:] + [0] * size)[:size]
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
