from __future__ import annotations

import argparse

import pytest

from tests.settings.conftest import Pot, Tray
from twotower.settings.command_line import OneLineParser, add_config, add_settings, given


def _parser(config: type) -> argparse.ArgumentParser:
    parser = OneLineParser(prog="tea", allow_abbrev=False)
    add_config(parser, config)
    return parser


def test_options_are_handed_on_as_they_were_given() -> None:
    args = _parser(Pot).parse_args(["--drain", "x", "--warm", "--redis", "here", "--guest", "ann", "--guest", "bob"])
    assert given(args, Pot).options == {"drain": "x", "warm": "true", "redis": "here", "guest": "ann,bob"}


def test_a_secret_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _parser(Pot).parse_args(["--key", "sesame"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --key sesame (see `tea --help`)\n"


def test_help_has_what_parts_share_once() -> None:
    text = " ".join(_parser(Tray).format_help().split())
    assert text.count("--drain DRAIN seconds (default: 30)") == 1
    assert "left: --kind {tea,coffee} what is in it (default: tea)" in text
    assert "--threads THREADS of all (default: one each)" in text


def test_some_settings_in_a_command_without_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_DRAIN", "4")
    parser = argparse.ArgumentParser()
    add_settings(parser, Pot, ["drain_s", "kind"])
    args = parser.parse_args([])
    assert (args.drain, args.kind) == (4.0, "tea")
    assert parser.parse_args(["--drain", "5"]).drain == 5.0
