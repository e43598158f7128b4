"""Every command in the pages runs: here those that need no running stack."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import CANNOT_RUN, SERVES, Checkout, blocks_of, cannot_run, pages_with_commands, plain
from tests.support.documents import ROOT, fenced
from twotower.cli.main import build_parser

from .test_commands_with_a_stack import PAGES as PAGES_WITH_A_STACK

PAGES = [page for page in pages_with_commands() if page not in PAGES_WITH_A_STACK]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("checkout"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_run(checkout: Checkout, page: Path) -> None:
    for block in blocks_of(page):
        checkout.run_block(block)


def test_what_cannot_run_is_as_short_a_list_as_it_can_be() -> None:
    commands = [plain(command) for page in pages_with_commands() for block in blocks_of(page) for command in block.commands]
    for pattern in CANNOT_RUN:
        assert any(re.search(pattern, command) for command in commands), f"{pattern}: no page has such a command any more"
    assert len(CANNOT_RUN) <= 6


def test_what_cannot_run_is_right_all_the_same() -> None:
    """Options are parsed, and targets have a recipe."""
    parser, seen = build_parser(), 0
    for page in pages_with_commands():
        for block in blocks_of(page):
            for command in block.commands if block.language != "python" else []:
                if cannot_run(command) is None and not re.search(SERVES, plain(command)):
                    continue
                program, *words = shlex.split(plain(command))
                seen += 1
                if program == "make":
                    subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, check=True)
                elif program == "twotower":
                    parser.parse_args(words)
    assert seen >= 8


def test_blocks_without_a_language_are_either_commands_or_output() -> None:
    """`is_shell` fails for one that is both, in which a command would go unnoticed."""
    assert sum(block.is_shell for page in pages_with_commands() for block in fenced(page)) > 12
