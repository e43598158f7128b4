"""The schemas of the OpenAPI document: requests as they are checked, replies as they are made."""

from __future__ import annotations

from typing import Any

from twotower.gateway.openai_chat import ROLES
from twotower.gateway.openai_fields import MAX_CHOICES, MODES, STREAM_OPTIONS, TIERS
from twotower.gateway.request import MAX_STOP_LENGTH, MAX_STOP_STRINGS
from twotower.request import MAX_BLOCK_SIZE, MAX_EOS_TOKENS, MAX_LOGPROBS, MAX_SEED, MAX_TIMEOUT_S, MAX_TOP_K

Json = dict[str, Any]

TEXT: Json = {"type": "string"}
FLAG: Json = {"type": "boolean"}
INTEGER: Json = {"type": "integer"}
NUMBER: Json = {"type": "number"}
COUNT: Json = {"type": "integer", "minimum": 0}
TOKEN: Json = {"type": "integer", "minimum": 0}


def ref(name: str) -> Json:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Json, description: str = "") -> Json:
    described = {"description": description} if description else {}
    return {"anyOf": [schema, {"type": "null"}], **described}


def _list(items: Json, **bounds: int) -> Json:
    return {"type": "array", "items": items, **bounds}


def _range(kind: Json, low: float, high: float | None = None) -> Json:
    return {**kind, "minimum": low, **({} if high is None else {"maximum": high})}


def _object(properties: Json, *optional: str, closed: bool = True) -> Json:
    """An object with all of these properties, but for those that are optional; `closed`: and no others."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
        **({"additionalProperties": False} if closed else {}),
    }


def _nothing(*values: Any) -> Json:
    """A field that is taken only where it asks for nothing."""
    return {"enum": [None, *values], "description": "Not supported: taken at a value that asks for nothing."}


STOP: Json = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}

GENERATION: Json = {
    "model": _or_null(TEXT, "The served model's name; null: whichever is served."),
    "mode": _or_null({"enum": list(MODES)}, "Who writes. Ours."),
    "max_tokens": _or_null(_range(INTEGER, 1), "Most tokens to write."),
    "max_completion_tokens": _or_null(_range(INTEGER, 1), "Another name of max_tokens."),
    "n": _or_null(_range(INTEGER, 1, MAX_CHOICES), "Texts for each prompt, with seeds that follow each other."),
    "temperature": _or_null(_range(NUMBER, 0), "0, the default, is greedy."),
    "top_p": _or_null({**NUMBER, "exclusiveMinimum": 0, "maximum": 1}),
    "top_k": _or_null(_range(INTEGER, 0, MAX_TOP_K), "0: all tokens."),
    "seed": _or_null(_range(INTEGER, 0, MAX_SEED), "The same seed gives the same text; 0 unless given."),
    "stop": _or_null({"anyOf": [STOP, _list(STOP, maxItems=MAX_STOP_STRINGS)]}),
    "stream": _or_null(FLAG),
    "stream_options": _or_null(
        _object({name: _or_null(FLAG) for name in STREAM_OPTIONS}, *STREAM_OPTIONS), "Only with stream: true."
    ),
    "gamma": _or_null(_range(NUMBER, 0, 1), "Confidence above which a position is committed. Ours."),
    "block_size": _or_null(_range(INTEGER, 1, MAX_BLOCK_SIZE), "Tokens a block. Ours."),
    "steps": _or_null(_range(INTEGER, 1), "Most forwards a block. Ours."),
    "ignore_eos": _or_null(FLAG),
    "eos_token_ids": _or_null(_list(TOKEN, maxItems=MAX_EOS_TOKENS)),
    "timeout_s": _or_null({**NUMBER, "exclusiveMinimum": 0, "maximum": MAX_TIMEOUT_S}, "How long the call may take. Ours."),
    "details": _or_null(FLAG, "With each token's block, step and confidence. Ours."),
    "stream_steps": _or_null(FLAG, "Events of type `step` show blocks on their way; only with stream: true. Ours."),
    "service_tier": _or_null({"enum": list(TIERS)}, "Who goes first where requests wait."),
    "user": {"description": "Ignored."},
    "metadata": {"description": "Ignored."},
    "presence_penalty": _nothing(0),
    "frequency_penalty": _nothing(0),
    "logit_bias": _nothing({}),
    "min_tokens": _nothing(0),
    "repetition_penalty": _nothing(1),
    "response_format": _nothing({"type": "text"}),
    "prompt_logprobs": _nothing(),
    "store": _nothing(False),
}

COMPLETION_REQUEST = _object(
    {
        "prompt": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                _list({"type": "string", "minLength": 1}, minItems=1),
                _list(TOKEN, minItems=1),
                _list(_list(TOKEN, minItems=1), minItems=1),
            ]
        },
        **GENERATION,
        "max_tokens": _or_null(_range(INTEGER, 0), "Most tokens to write; 16 unless given, 0 only with echo."),
        "logprobs": _or_null(_range(INTEGER, 0, MAX_LOGPROBS), "Likeliest tokens to name at each place."),
        "echo": _or_null(FLAG, "The text begins with the prompt, with its tokens' log probabilities if they are asked for."),
        "best_of": _or_null(_range(INTEGER, 1, MAX_CHOICES), "Must be n."),
        "suffix": _nothing(""),
    },
    *GENERATION,
    *("logprobs", "echo", "best_of", "suffix"),
)

PART = _object({"type": {"const": "text"}, "text": TEXT}, closed=False)

MESSAGE = _object({"role": {"enum": list(ROLES)}, "content": {"anyOf": [TEXT, _list(PART)]}, "name": _or_null(TEXT)}, "name")

CHAT_ONLY: Json = {
    "logprobs": _or_null(FLAG),
    "top_logprobs": _or_null(_range(INTEGER, 0, MAX_LOGPROBS), "Only with logprobs: true."),
    "safety_identifier": {"description": "Ignored."},
    "prompt_cache_key": {"description": "Ignored."},
    "tools": _nothing([]),
    "tool_choice": _nothing("none", "auto"),
    "parallel_tool_calls": _nothing(True, False),
    "functions": _nothing([]),
    "function_call": _nothing("none", "auto"),
    "modalities": _nothing(["text"]),
    "audio": _nothing(),
    "prediction": _nothing(),
    "reasoning_effort": _nothing(),
    "verbosity": _nothing(),
    "web_search_options": _nothing(),
}

CHAT_REQUEST = _object({"messages": _list(MESSAGE, minItems=1), **GENERATION, **CHAT_ONLY}, *GENERATION, *CHAT_ONLY)

USAGE = _object(
    {
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "total_tokens": COUNT,
        "forwards": COUNT,
        "blocks": COUNT,
        "tokens_per_forward": _or_null(_range(NUMBER, 0)),
        "rounds": COUNT,
        "context_forwards": COUNT,
        "completion_tokens_details": _object({"accepted_prediction_tokens": COUNT, "rejected_prediction_tokens": COUNT}),
    },
    *("rounds", "context_forwards", "completion_tokens_details"),
)

DETAIL = _object(
    {"token_id": TOKEN, "block": COUNT, "step": _or_null(_range(INTEGER, 1)), "confidence": _or_null(_range(NUMBER, 0))}
)

FINISH: Json = {"enum": ["stop", "length"]}

OURS: Json = {"token_ids": _list(TOKEN), "details": _list(ref("Detail"))}

LOGPROBS = _object(
    {
        "tokens": _list(TEXT),
        "token_logprobs": _list(_or_null(NUMBER)),
        "top_logprobs": _or_null(_list(_or_null({"type": "object", "additionalProperties": NUMBER}))),
        "text_offset": _list(COUNT),
    }
)

TOP: Json = {"token": TEXT, "logprob": NUMBER, "bytes": _or_null(_list(_range(INTEGER, 0, 255)))}

CHAT_LOGPROBS = _object({"content": _list(_object({**TOP, "top_logprobs": _list(_object(TOP))})), "refusal": {"type": "null"}})


def _reply(kind: str, choice: Json) -> Json:
    head: Json = {"id": TEXT, "object": {"const": kind}, "created": INTEGER, "model": TEXT}
    body = {**head, "choices": _list(choice), "usage": ref("Usage"), "warnings": _list(TEXT)}
    return _object(body, "warnings")


SCHEMAS: Json = {
    "CompletionRequest": COMPLETION_REQUEST,
    "ChatRequest": CHAT_REQUEST,
    "Completion": _reply(
        "text_completion",
        _object(
            {"index": COUNT, "text": TEXT, "finish_reason": FINISH, "logprobs": _or_null(ref("Logprobs")), **OURS}, "details"
        ),
    ),
    "ChatCompletion": _reply(
        "chat.completion",
        _object(
            {
                "index": COUNT,
                "message": _object({"role": {"const": "assistant"}, "content": TEXT, "refusal": {"type": "null"}}),
                "finish_reason": FINISH,
                "logprobs": _or_null(ref("ChatLogprobs")),
                **OURS,
            },
            "details",
        ),
    ),
    "Usage": USAGE,
    "Detail": DETAIL,
    "Logprobs": LOGPROBS,
    "ChatLogprobs": CHAT_LOGPROBS,
    "Model": _object(
        {
            "id": TEXT,
            "object": {"const": "model"},
            "created": INTEGER,
            "owned_by": TEXT,
            "checkpoint_id": TEXT,
            "vocab_size": COUNT,
            "max_context": COUNT,
            "max_model_len": COUNT,
            "block_size": COUNT,
            "modes": _list({"enum": list(MODES)}),
            "has_tokenizer": FLAG,
            "has_chat_template": FLAG,
        }
    ),
    "Models": _object({"object": {"const": "list"}, "data": _list(ref("Model"))}),
    "TokenizeRequest": _object(
        {
            "model": _or_null(TEXT),
            "prompt": _or_null(TEXT, "This, or messages."),
            "messages": _or_null(_list(MESSAGE, minItems=1)),
            "add_special_tokens": _or_null(FLAG, "What the tokenizer adds to a text; by default to a prompt only."),
            "add_generation_prompt": _or_null(FLAG, "Of messages; true unless given."),
            "return_token_strs": _or_null(FLAG),
        },
        *("model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs"),
    ),
    "Tokens": _object({"count": COUNT, "max_model_len": COUNT, "tokens": _list(TOKEN), "token_strs": _or_null(_list(TEXT))}),
    "DetokenizeRequest": _object({"model": _or_null(TEXT), "tokens": _list(TOKEN)}, "model"),
    "Text": _object({"prompt": TEXT}),
    "Version": _object({"version": TEXT}),
    "Health": _object({"status": {"enum": ["alive", "ready", "not ready"]}, "reason": TEXT}, "reason"),
    "Document": {"type": "object"},
    "Error": _object({"error": _object({"message": TEXT, "type": TEXT, "param": _or_null(TEXT), "code": _or_null(TEXT)})}),
}
