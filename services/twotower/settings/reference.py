"""The reference page of settings, from their declarations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from twotower.settings.declare import Secret, Setting, settings_of
from twotower.settings.values import show

HEAD = """\
# Configuration

Generated from the declarations of the settings (`*/config.py` of each service) by `python -m twotower.cli.configuration`.

A setting has the same name in all sources. The first source that sets it applies:

1. the **command line**: `--max-sessions 32`;
2. the **environment**: `TWOTOWER_MAX_SESSIONS=32`; an empty variable counts as unset;
3. a **settings file** in TOML, which `--settings FILE` or `TWOTOWER_SETTINGS` names: `max_sessions = 32`;
4. its **default**.

One file can serve several commands: keys at its top apply to each command that has such a setting. A table with the name of a
command applies to that command alone, and takes precedence over the top. (`twotower up` reads `[up]`; other tables are for
services that are started one by one.)

```toml
checkpoint = "/models/word-problems"

[context]
max_sessions = 32

[denoiser]
slots = 16
```

A name that no command knows, in the environment (where it begins with `TWOTOWER_`) or in a file, ends the command with one
line that names it; so does a value that a setting cannot have. Variables that Kubernetes sets for services called
`twotower-...` are ignored.

**Secrets** are never on a command line, which every user of a machine can read: they come by environment, by a settings file,
or by a file with only the secret, which a variable names, as orchestrators mount them
(`TWOTOWER_REDIS_URL_FILE=/run/secrets/redis-url`). `twotower up` passes settings to its services by environment.

Sizes are bytes, or numbers with K, M, G or T (powers of 1024). For a setting with several texts, the option is
repeated, the variable separates them by commas, and the file has a list.
"""


def reference(commands: Mapping[str, tuple[str, type]]) -> str:
    """The page, in Markdown. `commands`: name -> (description, class of its settings)."""
    return "\n".join([HEAD, *(line for name, (what, config) in commands.items() for line in _command(name, what, config))])


def _command(name: str, what: str, config: type) -> Iterator[str]:
    yield f"## `twotower {name}`"
    yield ""
    yield what[0].upper() + what[1:] + "."
    yield ""
    yield "| Option | Environment | Default | Range | Meaning |"
    yield "|---|---|---|---|---|"
    for setting in settings_of(config).values():
        option = f"`{setting.option}`" if setting.option else f"none; in a file `{setting.name}`"
        variables = ", ".join(f"`{variable}`" for variable in (*setting.variables, setting.file_variable) if variable)
        cells = (option, variables, _default(setting), _range(setting), _meaning(setting))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _default(setting: Setting) -> str:
    if setting.about.otherwise:
        return setting.about.otherwise
    return "none" if setting.default in (None, ()) else f"`{show(setting.default)}`"


def _range(setting: Setting) -> str:
    about = setting.about
    if about.choices:
        return ", ".join(f"`{choice}`" for choice in about.choices)
    if about.unit == "bytes":
        return "a size" + "".join(f", or `{word}`" for word in about.words)
    least = 0 if about.unit == "s" and about.least is None else about.least
    unit = " s" if about.unit == "s" else ""
    if least is not None and about.most is not None:
        return f"{least} to {about.most}{unit}"
    if least is not None:
        return f"at least {least}{unit}"
    return {
        bool: "`true`, `false`",
        int: "a whole number",
        float: "a number",
        Path: "a path",
        tuple: "texts, with commas between",
    }.get(setting.kind, "text")


def _meaning(setting: Setting) -> str:
    secret = {Secret.NO: "", Secret.PASSWORD: "; a password in it is a secret", Secret.ALL: "; a secret"}[setting.about.secret]
    return setting.about.help + secret
