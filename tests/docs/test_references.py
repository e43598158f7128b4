"""No page, docstring or comment points at a file, a heading, a command or a target that is not there."""

from __future__ import annotations

import ast
import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.documents import ROOT, anchors, pages, prose, spans, tracked
from twotower.cli.main import build_parser

WRITTEN = {
    "sweep.md": "twotower eval --sweep",
    "suite.md": "twotower eval --suite",
    "test_x.py": "an example",
}
"""Names of files that are in no commit, and what writes them."""

FILE = re.compile(r"(?<![\w/.-])((?:\.\./)*[\w.-]+(?:/[\w.-]+)*\.(?:md|py|proto|cpp|toml|yml|svg|sh))(?![\w/]|\.\w)")
"""A source or document that a text names; what a program reads and writes (JSON, safetensors, PNG) is not meant."""


def exists(name: str, near: Path) -> bool:
    """Whether a tracked file has this name: from `near`'s folder, or as the end of a path."""
    if (near.parent / name).exists():
        return True
    ending = "/" + name.lstrip("./")
    return any(path.as_posix().endswith(ending) for path in tracked())


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page}: {target}"
        assert linked.is_relative_to(ROOT), f"{page}: {target} is outside of the repository"
        if anchor:
            assert anchor in anchors(linked), f"{page}: {target}: there is no such heading"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_pages_name_are_there(page: Path) -> None:
    named = {name for span in spans(page) for name in FILE.findall(span)}
    assert not {name for name in named if name not in WRITTEN and not exists(name, page)}, page


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_folders_that_pages_name_are_there(page: Path) -> None:
    """Paths from the root, such as `tests/support/`."""
    tops = "services|kernels|tests|docs|proto|examples"
    for span in spans(page):
        if re.fullmatch(rf"(?:{tops})(?:/[\w.-]+)*/?", span):
            assert (ROOT / span).exists() or exists(span, page), f"{page}: {span}"


def comments_and_docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        # Also the strings below a constant or a field, which say what it is.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_files_that_docstrings_and_comments_name_are_there() -> None:
    missing, seen = [], 0
    for path in tracked():
        if path.suffix != ".py" or "_pb2" in path.name or "checkpoints" in path.parts:
            continue
        for line, text in comments_and_docstrings(path):
            for name in FILE.findall(text):
                seen += 1
                if name not in WRITTEN and not exists(name, path):
                    missing.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not missing
    assert seen > 30


def test_headings_that_docstrings_name_are_there() -> None:
    """As in `(docs/model.md, MoE router)`."""
    seen = 0
    for path in tracked():
        if path.suffix == ".py":
            for line, text in comments_and_docstrings(path):
                for page, heading in re.findall(r"\b(docs/\w+\.md), ([A-Z][\w -]*?)(?=[).;:]|$)", " ".join(text.split())):
                    seen += 1
                    wanted = heading.lower().replace(" ", "-")
                    assert wanted in anchors(ROOT / page), f"{path}:{line}: {page} has no heading {heading!r}"
    assert seen >= 9


def test_targets_that_pages_name_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {span for page in pages() for span in spans(page) if span.startswith("make ")}
    assert len(named) > 5
    for span in named:
        words = [word for word in shlex.split(span)[1:] if "=" not in word]
        assert set(words) <= targets, span


def test_commands_that_pages_name_are_understood() -> None:
    """Inline ones, such as `twotower bench serving`: each is a command, with options that it has."""
    parser = build_parser()
    seen = 0
    for page in pages():
        for span in spans(page):
            if not re.match(r"twotower [a-z]", span) or re.search(r"\.\.\.|\||\{|…", span):
                continue
            seen += 1
            words = [re.sub(r"^[A-Z][A-Z_:]*$", "1", word) for word in shlex.split(span.replace("[", "").replace("]", ""))[1:]]
            with pytest.raises(SystemExit) as ended:
                parser.parse_args([*words, "--help"])
            assert ended.value.code == 0, f"{page}: {span}"
    assert seen > 20
