"""Settings as options of an argparse parser, which passes their text on unparsed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from twotower.settings.declare import Setting, parts_of, settings_of
from twotower.settings.sources import SETTINGS_VARIABLE, Sources, from_environment
from twotower.settings.values import check_secrecy, parse, show

HOW_ELSE = (
    "Each of these can also be a variable of the environment (--http-port: TWOTOWER_HTTP_PORT), or an entry of the file that "
    "--settings names (http_port = 8000). The command line goes before the environment, and that before the file."
)


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line, and where to read more."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown arguments here, where the command is known, rather than in the parser of all commands."""
        known, others = super().parse_known_args(args, namespace)
        if others:
            self.error(f"unrecognized arguments: {' '.join(others)}")
        return known, others

    def error(self, message: str) -> NoReturn:
        """Print the error, and end with status 2."""
        if "are required" in message:
            self.print_usage(sys.stderr)
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


def add_config(parser: argparse.ArgumentParser, config: type) -> None:
    """Add an option for each setting of a config class, and ``--settings``."""
    titles = {name: inside.title for name, inside in parts_of(config).items() if inside.title}
    groups: dict[str, argparse._ArgumentGroup] = {}
    for setting in settings_of(config).values():
        tops = {path[0] for path in setting.paths}
        # A setting that parts share is an option of the whole.
        title = titles.get(next(iter(tops)), "") if len(tops) == 1 else ""
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups.get(title, parser), setting)
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help=f"TOML file with settings (default: ${SETTINGS_VARIABLE}, or none)"
    )
    parser.epilog = HOW_ELSE


def given(args: argparse.Namespace, config: type) -> Sources:
    """The sources of a config class's values: the command line, the environment, and a settings file if one is named."""
    values = {setting.name: getattr(args, setting.name, None) for setting in settings_of(config).values()}
    words = {name: show(value) for name, value in values.items() if value is not None}  # a repeated option's values as one text
    return Sources(words, os.environ, args.settings)


def add_settings(parser: argparse.ArgumentParser, config: type, names: Iterable[str], **changes: Any) -> None:
    """Add options for some settings of a config class to a command without a config, which reads their values itself.

    `changes` are arguments of ``add_argument``, such as another help or default.
    """
    for name in names:
        setting = settings_of(config)[name]
        found = from_environment(setting, os.environ) if "default" not in changes else None
        default = setting.default if found is None else found[0]  # text is parsed like an option's, where it is used
        _add(parser, setting, **{"type": partial(_read, setting), "default": default, **changes})


def _read(setting: Setting, text: str) -> Any:
    check_secrecy(setting, text)
    return parse(setting, text)


def _add(parser: argparse.ArgumentParser | argparse._ArgumentGroup, setting: Setting, **changes: Any) -> None:
    if setting.option is None:
        return
    about = setting.about
    details: dict[str, Any] = {"dest": setting.name, "help": describe(setting), "default": None}
    if setting.kind is bool:
        details |= {"action": "store_const", "const": "true"}
    else:
        if setting.kind is tuple:
            details["action"] = "append"
        details["metavar"] = about.metavar or (f"{{{','.join(about.choices)}}}" if about.choices else setting.name.upper())
    parser.add_argument(setting.option, **{**details, **changes})


def describe(setting: Setting) -> str:
    """The setting's help, and what happens without it."""
    about = setting.about
    otherwise = about.otherwise or ("" if setting.default is None else show(setting.default))
    several = "; may be given several times" if setting.kind is tuple else ""
    return (about.help + several + (f" (default: {otherwise})" if otherwise else "")).replace("%", "%%")
