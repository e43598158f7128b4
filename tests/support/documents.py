"""The project's Markdown pages, and what stands in them: fenced blocks, links, headings."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

COMMANDS = ("make", "twotower", "curl", "python", "pip", "git", "cd")
"""First words of what a shell runs, without the directory in front of them."""


@cache
def tracked() -> tuple[Path, ...]:
    """Every file of the repository that is committed, or would be."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(ROOT / name for name in listed if (ROOT / name).exists())


@cache
def pages() -> tuple[Path, ...]:
    """All Markdown pages."""
    return tuple(path for path in tracked() if path.suffix == ".md")


@dataclass(frozen=True, slots=True)
class Fenced:
    """A fenced block."""

    page: Path
    line: int
    """Where it begins, from 1."""
    language: str
    text: str

    @property
    def is_shell(self) -> bool:
        """Whether every command in it is one; a block without a language may also be output. Fails for one that is neither."""
        if self.language:
            return self.language in ("bash", "sh", "shell", "console")
        known = [_is_command(command) for command in self.commands]
        assert all(known) or not any(known[:1]), f"{self.page}:{self.line}: partly commands: name its language"
        return bool(known) and all(known)

    @property
    def commands(self) -> list[str]:
        """Its lines, continued ones joined, without comments."""
        bare = re.sub(r"[ ]{2,}#.*$|[ ]#[^'\"\n]*$", "", self.text, flags=re.MULTILINE)
        joined = bare.replace("\\\n", " ")
        return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _is_command(line: str) -> bool:
    word = next((word for word in line.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)), "")
    return word.rpartition("/")[2] in COMMANDS or word.endswith(".sh")


def fenced(page: Path) -> Iterator[Fenced]:
    """All fenced blocks of a page."""
    begin, language, lines = 0, "", list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.lstrip().startswith("```"):
            lines.append(line)
        elif not begin:
            begin, language, lines = number, line.strip().removeprefix("```"), []
        else:
            yield Fenced(page, begin, language, "\n".join(lines))
            begin = 0
    assert not begin, f"{page}:{begin}: a block without an end"


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```[^\n]*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """What stands in single backticks in a page's prose."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def anchors(page: Path) -> set[str]:
    """What links into a page may name, as GitHub makes it from headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        plain = re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found
