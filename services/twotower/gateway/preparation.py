"""From a request as a client made it to one that the towers can take: the one way, with and without services."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.gateway.request import Request, check_length, check_unresolved, resolve
from twotower.request import GenerationParams, ModelLimits, check_request
from twotower.text.stream import TextStream
from twotower.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Checked:
    """A request that can be served: nothing of it is left open."""

    prompt: tuple[int, ...]
    params: GenerationParams
    warnings: tuple[str, ...]


class Preparation:
    """Checks and tokenizes requests for one model; a prompt that several of them have is tokenized once."""

    def __init__(self, tokenizer: Tokenizer | None, limits: ModelLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._known: dict[tuple[str, bool], tuple[int, ...]] = {}

    def check(self, request: Request) -> Checked:
        """Raises InvalidArgument, which names the field."""
        if not isinstance(request.prompt, str):
            check_length(len(request.prompt), self._limits.max_context)
        check_unresolved(request, self._tokenizer is not None)
        prompt = self._tokens(request)
        params = resolve(request, len(prompt), self._limits)
        return Checked(prompt, params, tuple(check_request(prompt, params, self._limits)))

    def _tokens(self, request: Request) -> tuple[int, ...]:
        if not isinstance(request.prompt, str):
            return request.prompt
        key = request.prompt, request.special_tokens
        if key not in self._known:
            assert self._tokenizer is not None  # check_unresolved
            most = self._limits.max_context
            self._known[key] = tuple(self._tokenizer.encode(request.prompt, most, special_tokens=request.special_tokens))
        return self._known[key]


def text_stream(tokenizer: Tokenizer | None, limits: ModelLimits, stop: tuple[str, ...]) -> TextStream | None:
    """What makes text of a generation's tokens; None without a tokenizer."""
    return None if tokenizer is None else TextStream(tokenizer, stop, hidden_ids(limits))


def hidden_ids(limits: ModelLimits) -> tuple[int, ...]:
    """Ids that never show in text, besides the tokenizer's special tokens."""
    return (*limits.eos_token_ids, limits.mask_token_id)
