"""Builds a config from values of its settings, and turns it back into variables for a child's environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from twotower.errors import ConfigError
from twotower.settings.declare import parts_of, settings_of
from twotower.settings.values import show

C = TypeVar("C")


def build(config: type[C], **values: Any) -> C:
    """A config in which these fields, its own or its parts', have these values, and all others their defaults.

    Raises ConfigError for an unknown name or a bad value.
    """
    settings = settings_of(config)
    plain = {declared.name for declared in dataclasses.fields(config) if not declared.metadata}  # type: ignore[arg-type]
    placed: dict[tuple[str, ...], Any] = {}
    for name, value in values.items():
        if name in settings:
            placed |= dict.fromkeys(settings[name].paths, value)
        elif name in plain:
            placed[(name,)] = value
        else:
            raise ConfigError(f"{name}: no such setting")
    return _assemble(config, placed)


def environment(config: object) -> dict[str, str]:
    """The variables from which a child process reads this config. Environments are not visible to other users."""
    values = {setting.variables[0]: setting.of(config) for setting in settings_of(type(config)).values()}
    return {variable: show(value) for variable, value in values.items() if value is not None}


def _assemble(config: type[C], placed: Mapping[tuple[str, ...], Any]) -> C:
    types = {declared.name: declared.default_factory for declared in dataclasses.fields(config)}  # type: ignore[arg-type]
    given: dict[str, Any] = {path[0]: value for path, value in placed.items() if len(path) == 1}
    for name in parts_of(config):
        inner = {path[1:]: value for path, value in placed.items() if path[0] == name and len(path) > 1}
        given[name] = _assemble(types[name], inner)  # type: ignore[arg-type]  # a part's factory is its class
    return config(**given)
