"""Settings' values to text and back, and the check of values."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from twotower.errors import ConfigError
from twotower.settings.declare import Secret, Setting, settings_of
from twotower.sizes import parse_bytes

YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def parse(setting: Setting, text: str, label: str | None = None) -> Any:
    """The value that `text` stands for. `label`: the setting's name in an error. Raises ConfigError."""
    label = label or setting.name
    value: Any = text
    if setting.about.unit == "bytes" and setting.kind is int:
        value = parse_bytes(text, label)
    elif setting.kind is int:
        value = _number(int, text, label, "a whole number")
    elif setting.kind is float:
        value = _number(float, text, label, "a number")
    elif setting.kind is bool:
        if text.lower() not in YES + NO:
            raise ConfigError(f"{label}: must be true or false, not {text!r}")
        value = text.lower() in YES
    elif setting.kind is tuple:
        value = tuple(word.strip() for word in text.split(",") if word.strip())
    elif setting.kind is Path:
        if "\0" in text or not text:
            raise ConfigError(f"{label}: must be a path, not {text!r}")
        value = Path(text)
    check_value(setting, value, label)
    return value


def show(value: Any) -> str:
    """A value as text from which `parse` makes it again."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, tuple | list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_value(setting: Setting, value: Any, label: str | None = None) -> None:
    """Raise ConfigError unless the setting may have this value."""
    label, about = label or setting.name, setting.about
    if value is None and setting.optional:
        return
    right = isinstance(value, int | float if setting.kind is float else setting.kind)
    if not right or (isinstance(value, bool) and setting.kind is not bool):
        raise ConfigError(f"{label}: must be of type {setting.kind.__name__}, not {type(value).__name__}")
    if isinstance(value, tuple) and not all(isinstance(word, str) and word.strip() and "," not in word for word in value):
        raise ConfigError(f"{label}: must be words without commas, not {value!r}")
    if setting.kind is float and about.unit == "s" and not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{label}: must be a finite number of seconds, not {value}")
    if setting.kind is float and not math.isfinite(value):
        raise ConfigError(f"{label}: must be a finite number, not {value}")
    if about.least is not None and value < about.least:
        raise ConfigError(f"{label}: must be at least {about.least}, not {value}")
    if about.most is not None and value > about.most:
        raise ConfigError(f"{label}: must be at most {about.most}, not {value}")
    if about.choices and value not in about.choices:
        raise ConfigError(f"{label}: must be one of {', '.join(about.choices)}, not {value!r}")
    if about.unit == "bytes" and setting.kind is str and value not in about.words:
        parse_bytes(value, label)


def check(config: object) -> None:
    """Raise ConfigError unless each setting that a config itself declares has a valid value. For ``__post_init__``."""
    for setting in settings_of(type(config)).values():
        if len(setting.paths[0]) == 1:  # parts have checked their own settings
            check_value(setting, setting.of(config))


def check_secrecy(setting: Setting, text: str) -> None:
    """Raise ConfigError if `text` must not be on a command line. The error does not repeat it."""
    # By pattern, not by parsing, since a password may make a URL invalid.
    if setting.about.secret is Secret.PASSWORD and re.search(r"//.*:.*@|password=", text):
        raise ConfigError(
            f"{setting.name}: every user of the machine can read a password on a command line; "
            f"set {setting.variables[0]}, or {setting.file_variable} to the path of a file that holds it"
        )


def _number(kind: type[int] | type[float], text: str, label: str, what: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{label}: must be {what}, not {text!r}") from None
