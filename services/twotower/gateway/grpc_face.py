"""The gRPC face: twotower.v1.Inference over the core."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from twotower.errors import InvalidArgument
from twotower.events import Accepted, Block, Event, Shown
from twotower.gateway.core import Core, ServedModel
from twotower.gateway.request import MAX_STOP_STRINGS, Request, check_length
from twotower.request import MAX_EOS_TOKENS, Mode, Priority
from twotower.rpc.channel import MAX_MESSAGE_BYTES
from twotower.v1 import inference_pb2, inference_pb2_grpc
from twotower.wire.logprobs import logprobs_to_pb
from twotower.wire.params import FINISH_TO_PB, MODE_FROM_PB, PRIORITY_FROM_PB, draft_use_to_pb
from twotower.wire.steps import step_to_pb

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name

DEFAULT_MAX_TOKENS = 256

MAX_ID_BYTES = 10
"""Of a token id on the wire."""
OTHER_BYTES = 128 * 1024
"""Of a message, beside its prompt: stop strings, mostly."""


def max_message_bytes(model: ServedModel) -> int:
    """Of a request: what a prompt that fills the context can take, as far as that is known."""
    token_bytes = None if model.tokenizer is None else model.tokenizer.max_token_bytes
    if model.tokenizer is not None and token_bytes is None:
        return MAX_MESSAGE_BYTES
    return min(MAX_MESSAGE_BYTES, model.limits.max_context * max(MAX_ID_BYTES, token_bytes or 0) + OTHER_BYTES)


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Messages in and out; everything else is the core's."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateEvent]:
        """Stream one generation; ending the call ends it."""
        remaining = context.time_remaining()
        deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
        asked = request_from_pb(request, self._core.model.limits.max_context)
        with self._core.admit([asked]):
            (prepared,) = await self._core.prepare([asked])
            del request, asked
            async with aclosing(self._core.run(prepared, deadline)) as events:
                async for event in events:
                    yield event_to_pb(event)

    async def GetModel(self, request: inference_pb2.GetModelRequest, context: Any) -> inference_pb2.GetModelResponse:
        """What is served, and its limits."""
        model = self._core.model
        return inference_pb2.GetModelResponse(
            model=model.name,
            checkpoint_id=model.identity,
            vocab_size=model.limits.vocab_size,
            max_context=model.limits.max_context,
            block_size=model.limits.block_size,
            has_tokenizer=model.tokenizer is not None,
        )


def request_from_pb(message: inference_pb2.GenerateRequest, max_context: int) -> Request:
    """The request a message asks for; of lists that are too long, nothing is taken. Raises InvalidArgument."""
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidArgument("prompt", "is missing; give text or token_ids")
    check_length(len(message.token_ids.ids), max_context)
    if len(message.stop) > MAX_STOP_STRINGS:
        raise InvalidArgument("stop", f"at most {MAX_STOP_STRINGS} strings, not {len(message.stop)}")
    if len(message.eos_token_ids) > MAX_EOS_TOKENS:
        raise InvalidArgument("eos_token_ids", f"at most {MAX_EOS_TOKENS}, not {len(message.eos_token_ids)}")
    mode = MODE_FROM_PB.get(message.mode)
    if message.mode == inference_pb2.MODE_UNSPECIFIED:
        mode = Mode.DIFFUSION
    if mode is None:
        raise InvalidArgument("mode", f"{message.mode} is unknown")
    priority = PRIORITY_FROM_PB.get(message.priority)
    if message.priority == inference_pb2.PRIORITY_UNSPECIFIED:
        priority = Priority.NORMAL
    if priority is None:
        raise InvalidArgument("priority", f"{message.priority} is unknown")
    return Request(
        prompt=message.text if kind == "text" else tuple(message.token_ids.ids),
        default_max_tokens=DEFAULT_MAX_TOKENS,
        mode=mode,
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        block_size=message.block_size if message.HasField("block_size") else None,
        steps=message.steps if message.HasField("steps") else None,
        gamma=message.gamma if message.HasField("gamma") else None,
        temperature=message.temperature if message.HasField("temperature") else None,
        top_k=message.top_k if message.HasField("top_k") else None,
        top_p=message.top_p if message.HasField("top_p") else None,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        eos_token_ids=tuple(message.eos_token_ids),
        priority=priority,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        show_steps=message.stream_steps,
    )


def event_to_pb(event: Event) -> inference_pb2.GenerateEvent:
    """The event as a message."""
    if isinstance(event, Accepted):
        accepted = inference_pb2.Accepted(
            request_id=event.request_id, prompt_tokens=event.prompt_tokens, warnings=event.warnings
        )
        return inference_pb2.GenerateEvent(accepted=accepted)
    if isinstance(event, Block):
        block = inference_pb2.Block(
            index=event.index,
            token_ids=event.token_ids,
            text=event.text,
            forwards=event.forwards,
            logprobs=logprobs_to_pb(event.logprobs),
            draft=draft_use_to_pb(event.use),
        )
        return inference_pb2.GenerateEvent(block=block)
    if isinstance(event, Shown):
        return inference_pb2.GenerateEvent(step=step_to_pb(event.step, event.block))
    finished = inference_pb2.Finished(
        finish_reason=FINISH_TO_PB[event.finish_reason],
        completion_tokens=event.completion_tokens,
        forwards=event.forwards,
        blocks=event.blocks,
        seconds=event.seconds,
        text=event.text,
        rounds=event.rounds,
        draft=draft_use_to_pb(event.use),
    )
    return inference_pb2.GenerateEvent(finished=finished)
