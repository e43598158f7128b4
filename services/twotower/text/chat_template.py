"""The checkpoint's chat template: messages to the text of a prompt, rendered by Jinja in its sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Never

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twotower.errors import CheckpointError, InvalidArgument

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
MAX_PROBLEM = 300
"""Characters of what a template says that an error repeats."""


class ChatTemplate:
    """A Jinja template, as Hugging Face's tokenizers have it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens`: variables of the template, such as ``bos_token``. Raises CheckpointError."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is not valid: {error}") from None
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, checkpoint: Path) -> ChatTemplate | None:
        """The template of a checkpoint directory; None where it brings none. Raises CheckpointError."""
        path, config = checkpoint / TEMPLATE_FILE, _config(checkpoint / CONFIG_FILE)
        try:
            source = path.read_text(encoding="utf-8") if path.exists() else _stored(config.get("chat_template"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no chat template: {error}") from None
        if source is None:
            return None
        tokens = {name: text for name in SPECIAL_TOKENS if (text := _text_of(config.get(name))) is not None}
        return cls(source, tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt that these messages make. Raises InvalidArgument, with what the template says where it refuses them."""
        try:
            return self._template.render(
                **self._special_tokens,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        except _RefusedError as error:
            raise InvalidArgument("messages", f"the chat template refuses them: {str(error)[:MAX_PROBLEM]}") from None
        except Exception as error:  # whatever a template's expressions can raise
            problem = f"{type(error).__name__}: {error}"[:MAX_PROBLEM]
            raise InvalidArgument("messages", f"the chat template cannot render them: {problem}") from None


class _RefusedError(jinja2.TemplateError):
    """What a template raises itself."""


class _Generation(Extension):
    """``{% generation %}``, with which templates mark what a model wrote, for training: here, its content."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's nodes, in its place."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise(message: object) -> Never:
    raise _RefusedError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _config(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no tokenizer configuration: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is no tokenizer configuration: it holds no JSON object")
    return config


def _stored(template: Any) -> str | None:
    """A template, or the one called "default" of several."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) and template else None


def _text_of(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
