"""Chat templates: where they are found, what they may do, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twotower.errors import CheckpointError, InvalidArgument
from twotower.text.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MESSAGES = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi <b>"}]


def write(path: Path, **config: Any) -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}, **config}))
    return path


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    assert ChatTemplate.load(write(tmp_path)) is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    for stored in (CHATML, named):
        template = ChatTemplate.load(write(tmp_path, chat_template=stored))
        assert template is not None
        assert template.render(MESSAGES) == "<|system|>short</s><|user|>hi <b></s><|assistant|>"
        assert template.render(MESSAGES, add_generation_prompt=False).endswith("hi <b></s>")
    (tmp_path / "chat_template.jinja").write_text("a file: {{ messages[0].content }}")
    template = ChatTemplate.load(tmp_path)
    assert template is not None
    assert template.render(MESSAGES) == "a file: short"


def test_what_published_templates_use() -> None:
    source = """{%- for m in messages %}
    {%- if m.role == 'skip' %}{%- continue %}{%- endif %}
    {%- generation %}{{ m | tojson }}{%- endgeneration %}
{%- endfor %}{{ strftime_now('%Y')[:2] }}"""
    messages = [{"role": "skip", "content": "x"}, {"role": "user", "content": "<日>"}]
    assert ChatTemplate(source, {}).render(messages) == '{"role": "user", "content": "<日>"}20'


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate' + 'x' * 10000) }}", {})
    with pytest.raises(InvalidArgument, match="messages: the chat template refuses them: roles must alternate") as caught:
        template.render(MESSAGES)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ messages[0].nothing.at_all }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidArgument, match="messages: the chat template cannot render them"):
        ChatTemplate(source, {}).render(MESSAGES)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="chat template is not valid"):
        ChatTemplate.load(write(tmp_path, chat_template="{% for %}"))
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is no tokenizer configuration"):
            ChatTemplate.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is no chat template"):
        ChatTemplate.load(tmp_path)
