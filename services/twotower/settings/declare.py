"""A setting is declared once: as a field of a frozen dataclass, with everything that is known about it.

```python
@dataclass(frozen=True, slots=True)
class DenoiserConfig:
    tower: TowerConfig = part(TowerConfig)
    slots: int = setting(8, least=1, metavar="N", help="sessions that are refined together")

    def __post_init__(self) -> None:
        check(self)
```

The option (``--slots``), the variable (``TWOTOWER_SLOTS``), the key of a settings file (``slots``), the environment of a
launcher's child, the help and the reference page all follow from the declaration.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

PREFIX = "TWOTOWER_"
"""The beginning of the names of all our environment variables."""

KINDS = (bool, int, float, str, Path)
"""The types of a setting, each also with None; the other type is ``tuple[str, ...]``, with the default ()."""


class Secret(Enum):
    """Whether a setting must be kept from those who can list a machine's processes."""

    NO = "no"
    PASSWORD = "the password in it"
    """A URL that may contain a password; it may be given on a command line without one."""
    ALL = "all of it"
    """The setting has no option: it comes by environment or file."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """The declaration of a setting, besides its field, type and default."""

    help: str
    name: str | None = None
    """The setting's name, if it is not the field's without its unit: ``drain`` for ``drain_s``."""
    variables: tuple[str, ...] = ()
    """The variables, if they are not ``TWOTOWER_`` and the name; the first is the one that a launcher sets."""
    metavar: str | None = None
    unit: str = ""
    """``s`` or ``bytes``; the name of a numeric field ends in it."""
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    """Words that may stand in place of a size, such as ``auto``."""
    otherwise: str = ""
    """What happens if the setting is not given, where the default does not show it."""
    secret: Secret = Secret.NO


@dataclass(frozen=True, slots=True)
class Part:
    """A field that holds another config, whose settings are options of the whole, too."""

    title: str
    """The heading of its options in a help; empty: they are listed among those of the whole."""
    without: tuple[str, ...]
    """Fields, its own or its parts', that the whole sets."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of a config class, or of some of its parts."""

    field: str
    kind: type
    optional: bool
    """Whether the value may be None."""
    default: Any
    about: Declaration
    paths: tuple[tuple[str, ...], ...]
    """Where the value is in the config: attribute names, from the outside in. Several where parts share the setting."""

    @property
    def name(self) -> str:
        """The setting's name for users, in words joined by underscores."""
        ending = {"s": "_s", "bytes": "_bytes"}.get(self.about.unit, "") if self.kind in (int, float) else ""
        return self.about.name or self.field.removesuffix(ending)

    @property
    def option(self) -> str | None:
        """The option of the command line; None: there is none."""
        return None if self.about.secret is Secret.ALL else "--" + self.name.replace("_", "-")

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that set it."""
        return self.about.variables or (PREFIX + self.name.upper(),)

    @property
    def file_variable(self) -> str | None:
        """The variable that names a file with only this value, as orchestrators mount secrets; None: there is none."""
        return None if self.about.secret is Secret.NO else self.variables[0] + "_FILE"

    def of(self, config: object) -> Any:
        """The setting's value in a config."""
        return functools.reduce(getattr, self.paths[0], config)


def setting(default: Any, *, help: str, **about: Any) -> Any:
    """A field that is a setting; `about`: see `Declaration`."""
    return field(default=default, metadata={"about": Declaration(help, **about)})


def like(config: type, name: str, default: Any, **changes: Any) -> Any:
    """A field with the declaration of `name` in another config class, except for its default and these changes."""
    return field(default=default, metadata={"about": dataclasses.replace(_fields(config)[name].metadata["about"], **changes)})


def part(config: type, title: str = "", without: tuple[str, ...] = ()) -> Any:
    """A field that holds another config; see `Part`. A setting of the whole hides a part's setting of the same name."""
    return field(default_factory=config, metadata={"part": Part(title, without)})


def settings_of(config: type) -> Mapping[str, Setting]:
    """All settings of a config class and of its parts, by their fields' names.

    Raises TypeError for contradictory declarations: parts with different settings of one name.
    """
    return _settings_of(config)


@functools.cache
def _settings_of(config: Hashable) -> Mapping[str, Setting]:
    assert isinstance(config, type)
    hints = typing.get_type_hints(config)
    fields = _fields(config)
    own = {name for name, declared in fields.items() if "about" in declared.metadata}
    found: dict[str, Setting] = {}
    for name, declared in fields.items():
        if name in own:
            kind, optional = _kind(hints[name])
            found[name] = Setting(name, kind, optional, declared.default, declared.metadata["about"], ((name,),))
        inside: Part | None = declared.metadata.get("part")
        for inner in () if inside is None else settings_of(hints[name]).values():
            if inside is None or inner.field in own or inner.field in inside.without:
                continue
            paths = tuple((name, *path) for path in inner.paths)
            if (known := found.get(inner.field)) is not None:
                if dataclasses.replace(known, paths=inner.paths) != inner:
                    raise TypeError(f"{config.__name__}: its parts differ in {inner.field}")
                paths = known.paths + paths
            found[inner.field] = dataclasses.replace(inner, paths=paths)
    if len({one.name for one in found.values()}) != len(found):
        raise TypeError(f"{config.__name__}: two settings have one name")
    return types.MappingProxyType(found)


def parts_of(config: type) -> dict[str, Part]:
    """The fields of a config class that hold other configs."""
    return {name: declared.metadata["part"] for name, declared in _fields(config).items() if "part" in declared.metadata}


def _fields(config: type) -> dict[str, dataclasses.Field[Any]]:
    return {declared.name: declared for declared in dataclasses.fields(config)}


def _kind(hint: Any) -> tuple[type, bool]:
    if hint == tuple[str, ...]:
        return tuple, False
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [choice for choice in choices if choice is not type(None)]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise TypeError(f"a setting cannot be {hint}")
    return kinds[0], type(None) in choices
