"""``python -m twotower.cli.configuration [FILE]``: write the reference page of settings, `docs/configuration.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from twotower.cli.commands import SERVICES, WHAT
from twotower.settings.reference import reference


def page() -> str:
    """The page, in Markdown."""
    return reference({name: (WHAT[name], config) for name, config in SERVICES.items()})


if __name__ == "__main__":
    Path(*sys.argv[1:2] or ["docs/configuration.md"]).write_text(page(), encoding="utf-8")
