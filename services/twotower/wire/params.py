"""Generation parameters as messages, and back."""

from __future__ import annotations

from twotower.internal.v1 import link_pb2
from twotower.request import DraftUse, FinishReason, GenerationParams, Mode, Priority
from twotower.v1 import inference_pb2

MODE_TO_PB = {
    Mode.DIFFUSION: inference_pb2.MODE_DIFFUSION,
    Mode.AR: inference_pb2.MODE_AR,
    Mode.SPECULATIVE: inference_pb2.MODE_SPECULATIVE,
}
MODE_FROM_PB = {value: key for key, value in MODE_TO_PB.items()}
FINISH_TO_PB = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}
FINISH_FROM_PB = {value: key for key, value in FINISH_TO_PB.items()}

PRIORITY_TO_PB = {
    Priority.NORMAL: inference_pb2.PRIORITY_NORMAL,
    Priority.HIGH: inference_pb2.PRIORITY_HIGH,
    Priority.LOW: inference_pb2.PRIORITY_LOW,
}
PRIORITY_FROM_PB = {value: key for key, value in PRIORITY_TO_PB.items()}

NO_LOGPROBS = -1


def params_to_pb(params: GenerationParams) -> link_pb2.Params:
    """For the wire. Mock-AR never leaves a process."""
    return link_pb2.Params(
        mode=MODE_TO_PB[params.mode],
        max_tokens=params.max_tokens,
        block_size=params.block_size,
        steps=params.steps,
        gamma=params.gamma,
        temperature=params.temperature,
        seed=params.seed,
        top_k=params.top_k,
        top_p=params.top_p,
        eos_token_ids=params.eos_token_ids,
        logprobs=NO_LOGPROBS if params.logprobs is None else params.logprobs,
        show_steps=params.show_steps,
    )


def params_from_pb(message: link_pb2.Params) -> GenerationParams:
    """From the wire; unchecked (see `check_request`)."""
    return GenerationParams(
        mode=MODE_FROM_PB.get(message.mode, Mode.DIFFUSION),
        max_tokens=message.max_tokens,
        block_size=message.block_size,
        steps=message.steps,
        gamma=message.gamma,
        temperature=message.temperature,
        seed=message.seed,
        top_k=message.top_k,
        top_p=message.top_p,
        eos_token_ids=tuple(message.eos_token_ids),
        logprobs=None if message.logprobs == NO_LOGPROBS else message.logprobs,
        show_steps=message.show_steps,
    )


def draft_use_to_pb(use: DraftUse) -> inference_pb2.DraftUse | None:
    """For the wire; None, an absent field, where nothing is counted."""
    if use == DraftUse():
        return None
    return inference_pb2.DraftUse(drafted=use.drafted, accepted=use.accepted, context_forwards=use.context_forwards)


def draft_use_from_pb(message: inference_pb2.DraftUse) -> DraftUse:
    """From the wire."""
    return DraftUse(message.drafted, message.accepted, message.context_forwards)
