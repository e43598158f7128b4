"""What a client asks for, as both faces understand it, and how it becomes a request with nothing left open."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.errors import InvalidArgument
from twotower.request import GenerationParams, Mode, ModelLimits, Priority

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
"""Characters; as many may be held back."""

MAX_INT64 = 2**63 - 1

DEFAULT_GAMMA = 0.8
DEFAULT_TEMPERATURE = 0.0
DEFAULT_SEED = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it; None is for the gateway to decide."""

    prompt: str | tuple[int, ...]
    default_max_tokens: int
    """What a face gives where the client gives none; cut to what the context allows."""
    mode: Mode = Mode.DIFFUSION
    max_tokens: int | None = None
    block_size: int | None = None
    steps: int | None = None
    gamma: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    eos_token_ids: tuple[int, ...] = ()
    priority: Priority = Priority.NORMAL
    logprobs: int | None = None
    """None: without."""
    show_steps: bool = False
    """With each block as it is after every forward."""
    special_tokens: bool = True
    """Whether the tokenizer adds to a text what it adds to texts; a chat template has written that already."""


def check_length(prompt_tokens: int, max_context: int) -> None:
    """Refuse a prompt that leaves no room, before anything else is done with its ids. Raises InvalidArgument."""
    if prompt_tokens >= max_context:
        raise InvalidArgument("prompt", f"{prompt_tokens} tokens leave no room in the context of {max_context}")


def check_unresolved(request: Request, has_tokenizer: bool) -> None:
    """What can be told before the prompt is tokenized. Raises InvalidArgument."""
    if isinstance(request.prompt, str) and not request.prompt:
        raise InvalidArgument("prompt", "is empty; at least one token is needed")
    if isinstance(request.prompt, str) and not has_tokenizer:
        raise InvalidArgument("prompt", "this checkpoint has no tokenizer: send token ids")
    if request.stop and not has_tokenizer:
        raise InvalidArgument("stop", "this checkpoint has no tokenizer: there is no text to look for it in")
    if len(request.stop) > MAX_STOP_STRINGS:
        raise InvalidArgument("stop", f"at most {MAX_STOP_STRINGS} strings, not {len(request.stop)}")
    for stop in request.stop:
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            raise InvalidArgument("stop", f"a stop string has 1 to {MAX_STOP_LENGTH} characters, not {len(stop)}")
    if request.ignore_eos and request.eos_token_ids:
        raise InvalidArgument("ignore_eos", "contradicts eos_token_ids: give one of them")
    for field in ("max_tokens", "block_size", "steps", "seed", "top_k", "logprobs"):
        value = getattr(request, field)
        if value is not None and not -MAX_INT64 <= value <= MAX_INT64:
            raise InvalidArgument(field, "does not fit 64 bits")


def resolve(request: Request, prompt_tokens: int, limits: ModelLimits) -> GenerationParams:
    """Put the defaults where the client said nothing. The result is unchecked (see `check_request`)."""
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = max(1, min(request.default_max_tokens, limits.max_context - prompt_tokens))
    block_size = limits.block_size if request.block_size is None else request.block_size
    steps = block_size if request.steps is None else request.steps
    if request.mode is Mode.SPECULATIVE and request.steps is None and request.gamma is None:
        steps = 0  # as many as drafts earn
    return GenerationParams(
        mode=request.mode,
        max_tokens=max_tokens,
        block_size=block_size,
        steps=steps,
        gamma=DEFAULT_GAMMA if request.gamma is None else request.gamma,
        temperature=DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
        top_k=0 if request.top_k is None else request.top_k,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=DEFAULT_SEED if request.seed is None else request.seed,
        eos_token_ids=() if request.ignore_eos else request.eos_token_ids or limits.eos_token_ids,
        logprobs=request.logprobs,
        show_steps=request.show_steps,
    )
