"""`POST /tokenize` and `POST /detokenize`, in vLLM's form: the tokenizer alone, without a tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from twotower.errors import InvalidArgument
from twotower.gateway.bodies import Bodies
from twotower.gateway.core import Core
from twotower.gateway.http_generate import check_model
from twotower.gateway.json_body import parse_json
from twotower.gateway.openai_chat import parse_messages
from twotower.gateway.openai_fields import boolean, check_names, optional, string, token_ids
from twotower.text.tokenizer import Tokenizer

TOKENIZE_FIELDS = ("model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs")
DETOKENIZE_FIELDS = ("model", "tokens")


class TextEndpoints:
    """Both endpoints."""

    def __init__(self, core: Core, bodies: Bodies) -> None:
        self._core = core
        self._bodies = bodies

    async def tokenize(self, request: Request) -> Response:
        """A text, or messages, as token ids."""
        return await self._answer(request, self._tokenize)

    async def detokenize(self, request: Request) -> Response:
        """Token ids as a text."""
        return await self._answer(request, self._detokenize)

    async def _answer(self, request: Request, work: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Response:
        try:
            async with self._bodies.read(request) as body:
                return JSONResponse(await self._core.read(len(body), lambda: work(parse_json(body))))
        except ClientDisconnect:
            return Response(status_code=499)  # which nobody reads

    def _tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        model = self._core.model
        check_names(body, TOKENIZE_FIELDS, {}, "a request to tokenize")
        check_model(self._core, optional(body, "model", string))
        tokenizer = self._tokenizer("prompt")
        text, special = optional(body, "prompt", string), optional(body, "add_special_tokens", boolean)
        asked = optional(body, "add_generation_prompt", boolean)
        if (text is None) == (body.get("messages") is None):
            raise InvalidArgument("prompt", "or messages must be given, and not both")
        if text is None:
            if model.chat is None:
                raise InvalidArgument("messages", "this checkpoint brings no chat template; give a prompt")
            text, special = model.chat.render(parse_messages(body), add_generation_prompt=asked is not False), bool(special)
        ids = tokenizer.encode(text, model.limits.max_context, special_tokens=special is not False)
        names = [tokenizer.name(i) for i in ids] if optional(body, "return_token_strs", boolean) else None
        return {"count": len(ids), "max_model_len": model.limits.max_context, "tokens": ids, "token_strs": names}

    def _detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        limits = self._core.model.limits
        check_names(body, DETOKENIZE_FIELDS, {}, "a request to detokenize")
        check_model(self._core, optional(body, "model", string))
        tokenizer = self._tokenizer("tokens")
        tokens = token_ids("tokens", body.get("tokens"))
        if len(tokens) > limits.max_context:
            raise InvalidArgument("tokens", f"{len(tokens)} are more than the context of {limits.max_context} holds")
        for i, token in enumerate(tokens):
            if not 0 <= token < limits.vocab_size:
                raise InvalidArgument(
                    "tokens", f"token {token} at position {i} is outside the vocabulary [0, {limits.vocab_size})"
                )
        return {"prompt": tokenizer.decode(tokens)}

    def _tokenizer(self, field: str) -> Tokenizer:
        if self._core.model.tokenizer is None:
            raise InvalidArgument(field, "this checkpoint has no tokenizer")
        return self._core.model.tokenizer
