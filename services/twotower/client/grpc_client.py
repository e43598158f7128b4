"""The client: a generation is an async iterator of typed events; errors are those the server raised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from twotower.errors import InvalidArgument, TwoTowerError, Unavailable
from twotower.events import Accepted, Block, Event, Finished, Shown
from twotower.request import Mode, Priority
from twotower.rpc.channel import open_channel
from twotower.rpc.errors import error_from_rpc, raised_by_peer
from twotower.v1 import inference_pb2, inference_pb2_grpc
from twotower.wire.logprobs import logprobs_from_pb
from twotower.wire.params import FINISH_FROM_PB, MODE_TO_PB, PRIORITY_TO_PB, draft_use_from_pb
from twotower.wire.steps import step_from_pb


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a gateway serves."""

    model: str
    checkpoint_id: str
    vocab_size: int
    max_context: int
    block_size: int
    has_tokenizer: bool


class GatewayClient:
    """A gateway at `host:port`. Use it as an async context manager, or `close()` it."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._channel = open_channel(target)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; running generations are cancelled."""
        await self._channel.close(None)

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        mode: Mode = Mode.DIFFUSION,
        max_tokens: int | None = None,
        block_size: int | None = None,
        steps: int | None = None,
        gamma: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        priority: Priority = Priority.NORMAL,
        seed: int | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        eos_token_ids: Sequence[int] = (),
        logprobs: int | None = None,
        stream_steps: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Stream a generation: Accepted, Blocks, Finished. None: the server's default.

        stream_steps: between them, each block on its way, as Shown.

        Closing the iterator cancels the generation. Raises TwoTowerError; Unavailable where no gateway answers.
        """
        if mode not in MODE_TO_PB:
            raise InvalidArgument("mode", f"{mode.value} exists only in one process, not through a gateway")
        try:
            request = inference_pb2.GenerateRequest(
                mode=MODE_TO_PB[mode],
                max_tokens=max_tokens,
                block_size=block_size,
                steps=steps,
                gamma=gamma,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                priority=PRIORITY_TO_PB[priority],
                seed=seed,
                stop=stop,
                ignore_eos=ignore_eos,
                eos_token_ids=eos_token_ids,
                logprobs=logprobs,
                stream_steps=stream_steps,
            )
            if isinstance(prompt, str):
                request.text = prompt
            else:
                request.token_ids.SetInParent()  # an empty list is a prompt too, to be refused as such
                request.token_ids.ids.extend(prompt)
        except (ValueError, TypeError) as error:  # a number beyond 64 bits, a lone surrogate
            raise InvalidArgument("request", str(error)) from None
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            async for message in call:
                yield _event_from_pb(message)
        except grpc.aio.AioRpcError as rpc:
            raise self._error(rpc) from None
        finally:
            call.cancel()

    async def model(self) -> ModelInfo:
        """What is served, and its limits. Raises TwoTowerError."""
        try:
            answer = await self._stub.GetModel(inference_pb2.GetModelRequest())
        except grpc.aio.AioRpcError as rpc:
            raise self._error(rpc) from None
        return ModelInfo(
            model=answer.model,
            checkpoint_id=answer.checkpoint_id,
            vocab_size=answer.vocab_size,
            max_context=answer.max_context,
            block_size=answer.block_size,
            has_tokenizer=answer.has_tokenizer,
        )

    async def wait_ready(self, timeout_s: float) -> None:
        """Return once requests will succeed. Raises Unavailable, which says what was missing."""
        health = health_pb2_grpc.HealthStub(self._channel)
        problem = f"no gateway answers at {self.target}"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        answer = await health.Check(health_pb2.HealthCheckRequest())
                        if answer.status == health_pb2.HealthCheckResponse.SERVING:
                            return
                        problem = f"the gateway at {self.target} is not ready"
                    except grpc.aio.AioRpcError as rpc:
                        problem = str(self._error(rpc))
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise Unavailable(f"{problem} (waited {timeout_s:.0f} s)") from None

    def _error(self, rpc: grpc.aio.AioRpcError) -> TwoTowerError:
        if not raised_by_peer(rpc) and rpc.code() is grpc.StatusCode.UNAVAILABLE:
            return Unavailable(f"no gateway answers at {self.target} ({rpc.details()})")
        if not raised_by_peer(rpc) and rpc.code() is grpc.StatusCode.UNIMPLEMENTED:
            return Unavailable(f"what answers at {self.target} is no twotower gateway")
        return error_from_rpc(rpc)


def _event_from_pb(message: inference_pb2.GenerateEvent) -> Event:
    if message.HasField("accepted"):
        accepted = message.accepted
        return Accepted(accepted.request_id, accepted.prompt_tokens, tuple(accepted.warnings))
    if message.HasField("block"):
        block = message.block
        logprobs, use = logprobs_from_pb(block.logprobs), draft_use_from_pb(block.draft)
        return Block(block.index, tuple(block.token_ids), block.text, block.forwards, logprobs, use)
    if message.HasField("step"):
        return Shown(message.step.block, step_from_pb(message.step))
    done = message.finished
    return Finished(
        FINISH_FROM_PB[done.finish_reason],
        done.completion_tokens,
        done.forwards,
        done.blocks,
        done.seconds,
        done.text,
        done.rounds,
        draft_use_from_pb(done.draft),
    )
