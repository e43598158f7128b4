"""`python -m twotower.reference DIR`: write all pages into a directory."""

from __future__ import annotations

import sys
from pathlib import Path

from twotower.reference.pages import PAGES


def main() -> int:
    """Write the pages, and name those that changed."""
    if len(sys.argv) != 2:
        print("usage: python -m twotower.reference DIR", file=sys.stderr)
        return 2
    for name, page in PAGES.items():
        path = Path(sys.argv[1]) / name
        text = page()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
