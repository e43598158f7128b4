"""The sources of a setting's value: the command line, else the environment, else a settings file, else its default."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from twotower.errors import ConfigError
from twotower.settings.build import build
from twotower.settings.declare import PREFIX, Setting, settings_of
from twotower.settings.values import check_secrecy, parse, show

C = TypeVar("C")

SETTINGS_VARIABLE = PREFIX + "SETTINGS"
"""The variable that names a settings file."""
DEBUG_VARIABLE = PREFIX + "DEBUG"
"""The variable that acts like ``twotower --debug``."""
COMMON_VARIABLES = frozenset((SETTINGS_VARIABLE, DEBUG_VARIABLE))

# A service "twotower-redis" of Kubernetes puts TWOTOWER_REDIS_PORT=tcp://... into the environment of every container.
_LINK = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_|$)|_PORT_\d+_(TCP|UDP|SCTP)(_|$)")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")


@dataclass(frozen=True, slots=True)
class Sources:
    """The values that were given, as unparsed text."""

    options: Mapping[str, str]
    """Values from the command line, by the settings' names."""
    environ: Mapping[str, str]
    file: Path | None = None
    """A TOML file: its keys are for all commands that know them, and a table with a command's name is for that command."""


def load(config: type[C], command: str, commands: Mapping[str, type], sources: Sources, **plain: Any) -> C:
    """The config of `command`, which is one of `commands`. `plain`: its fields that are no settings.

    Raises ConfigError for names that no command knows and for bad values, with the place where they were given.
    """
    settings = settings_of(config)
    check_variables(sources.environ, {name for known in commands.values() for name in variables_of(known)})
    file = sources.file or (Path(named) if (named := sources.environ.get(SETTINGS_VARIABLE)) else None)
    filed = _from_file(file, command, commands) if file is not None else {}
    values = dict(plain)
    for field, setting in settings.items():
        given = _given(setting, sources, filed)
        if given is not None:
            values[field] = parse(setting, *given)
    return build(config, **values)


def from_environment(setting: Setting, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """A setting's text from the environment, and its variable; None: no variable sets it. Raises ConfigError."""
    names = [name for name in setting.variables if environ.get(name)]  # an empty variable counts as unset
    if (variable := setting.file_variable) is not None and environ.get(variable):
        names.append(variable)
    if len(names) > 1:
        raise ConfigError(f"{names[1]}: {names[0]} is set too; leave one of them out")
    if not names:
        return None
    if names[0] == variable:
        try:
            return Path(environ[variable]).read_text(encoding="utf-8").strip(), variable
        except (OSError, ValueError) as error:
            raise ConfigError(f"{variable}: cannot read {environ[variable]!r}: {_reason(error)}") from None
    return environ[names[0]], names[0]


def variables_of(config: type) -> Iterator[str]:
    """All variables that set a config's settings."""
    for setting in settings_of(config).values():
        yield from setting.variables
        if setting.file_variable is not None:
            yield setting.file_variable


def check_variables(environ: Mapping[str, str], known: Collection[str]) -> None:
    """Raise ConfigError for an unknown variable with our prefix, since its author believes that it sets something."""
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name in known or name in COMMON_VARIABLES:
            continue
        if not (_LINK.search(name) or (name.endswith("_PORT") and _LINK_VALUE.match(value))):
            raise ConfigError(f"{name}: no such setting{_similar(name, known)}")


def _given(setting: Setting, sources: Sources, filed: Mapping[str, tuple[str, str]]) -> tuple[str, str] | None:
    """A setting's text, and where it was given."""
    if (text := sources.options.get(setting.name)) is not None:
        check_secrecy(setting, text)
        return text, setting.name
    if (found := from_environment(setting, sources.environ)) is not None:
        if _LINK_VALUE.match(found[0]) and found[1].endswith("_PORT"):
            raise ConfigError(
                f"{found[1]}: {found[0]!r} is a port as Kubernetes announces services; set enableServiceLinks: false"
            )
        return found
    return filed.get(setting.name)


def _from_file(file: Path, command: str, commands: Mapping[str, type]) -> dict[str, tuple[str, str]]:
    """A command's settings in a settings file: name -> text, and its place in the file."""
    import tomllib

    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"settings: cannot read {str(file)!r}: {_reason(error)}") from None
    names = {known: {setting.name for setting in settings_of(config).values()} for known, config in commands.items()}
    found: dict[str, tuple[str, str]] = {}
    for key, value in content.items():
        if isinstance(value, dict) != (key in names):
            wrong = f"[{key}]: no such command" if isinstance(value, dict) else f"{key}: must be a table"
            raise ConfigError(f"{file}: {wrong}{_similar(key, names) if key not in names else ''}")
        table, known = (value, names[key]) if key in names else ({key: value}, set().union(*names.values()))
        for entry, said in table.items():
            where = f"{file}: " + (f"[{key}] " if key in names else "") + entry
            name = entry.replace("-", "_")
            if name not in known:
                raise ConfigError(f"{where}: no such setting{_similar(name, known)}")
            several = isinstance(said, list) and all(isinstance(one, str) for one in said)
            if not (several or isinstance(said, str | int | float)):
                raise ConfigError(f"{where}: must be one value, or a list of texts")
            if key == command or (key not in names and name in names[command] and name not in found):
                found[name] = (show(said), where)
    return found


def _similar(name: str, known: Collection[str]) -> str:
    import difflib

    found = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {found[0]}?" if found else ""


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
