"""Runs the commands that stand in the project's pages: as they are written, in a scratch directory that looks like a checkout.

What differs from the page is in the tables here: placeholders, addresses of what runs, and how long things take.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.support.documents import ROOT, Fenced, fenced, pages

SHIPPED = ROOT / "services" / "twotower" / "checkpoints" / "word-problems"
VECTORS = ROOT / "tests" / "conformance" / "data" / "hybrid-8l"
LIMIT_S = 180

CANNOT_RUN = {
    r"^make test$": "it runs these tests",
    r"^make setup$": "it installs packages; CI begins with it",
    r"^make lint$": "CI begins with it; it takes a minute",
    r"^make train ": "it trains for 14 minutes; tests/train/test_cli.py runs its command on a tiny shape",
    r"^twotower train .*--max-number": "the model card's own runs of 26 to 78 minutes; the options are parsed",
    r"^pip install 'lm_eval|^lm_eval ": "it needs an environment of its own; make test-lm-eval makes one and runs it",
}
"""Commands that are not run here, and why. Those of `make` must have a recipe, and those of `twotower` options that exist."""

SERVES = r"^twotower up\b|two_machines/\w+\.sh$"
"""Commands that run until they are stopped; the tests that start them say what comes of them."""

SHORTER = (
    (r"(twotower train (?:context|denoiser) .*?)--minutes \d+", r"\1--steps 1 --rows 2 --threads 1"),
    (r"(custom_denoiser\.py )--minutes \d+", r"\1--minutes 0.01 --texts 60"),
    (r"--problems \d+", "--problems 2"),
    (r"--batch 1 [\d ]*\d", "--batch 1 2"),
    (r"^(twotower eval .*)$", r"\1 --problems 2 --max-tokens 96 --threads 1 --compile no"),
    (r"(twotower bench kernels)", r"\1 --size small --batch 1 --context 128 --seconds 0.01 --threads 1"),
    (r"(twotower bench towers)", r"\1 --size small --batch 1 --context 128 --seconds 0.01 --threads 1"),
    (r"(twotower bench towers.* --experts fp\d)", r"\1 --roofline 4800,989"),  # only a GPU can measure it: here it is computed
)
"""The same commands with less to do."""

PLACES = (("DIR...", str(VECTORS)), ("CHECKPOINT", str(SHIPPED)))
"""What stands for a directory of the reader's."""


def blocks_of(page: Path) -> list[Fenced]:
    """Blocks of a page that are run: shell commands and Python."""
    return [block for block in fenced(page) if block.language == "python" or block.is_shell]


def pages_with_commands() -> list[Path]:
    """Pages that have any."""
    return [page for page in pages() if blocks_of(page)]


def plain(command: str) -> str:
    """A command without the directory of its program, as the tables here know it."""
    return command.replace(".venv/bin/", "")


def cannot_run(command: str) -> str | None:
    """Why a command is not run, if it is not."""
    return next((why for pattern, why in CANNOT_RUN.items() if re.search(pattern, plain(command))), None)


class Checkout:
    """A scratch directory with what commands expect of a checkout after `make setup`, and in which they may write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        programs = path / ".venv" / "bin"
        programs.mkdir(parents=True)
        modules = {"twotower": "-m twotower.cli.main", "pre-commit": "-m pre_commit", "python": ""}
        for name, module in modules.items():
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
            (programs / name).chmod(0o755)
        for name in ("tests", "examples", "services", "kernels", "docs", "pyproject.toml", ".pre-commit-config.yaml"):
            (path / name).symlink_to(ROOT / name)
        (path / "word-problems").symlink_to(SHIPPED)
        (path / "runs").mkdir()
        (path / "runs" / "suite").symlink_to(SHIPPED)  # what `make train` would write
        self.run("twotower train corpus --out texts.jsonl --count 60")
        self.run("git init --quiet")
        self.env: Mapping[str, str] = {}

    def run(self, command: str, replace: Iterable[tuple[str, str]] = ()) -> str:
        """Run one, after replacing words; returns stdout. Fails unless it ends well and without a traceback."""
        for pattern, other in SHORTER:
            command = re.sub(pattern, other, plain(command))
        for word, other in (*PLACES, *replace):
            command = command.replace(word, other)
        path = f"{self.path / '.venv' / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.path,
            env={**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr[-2000:]}"
        return done.stdout

    def run_block(self, block: Fenced, replace: Iterable[tuple[str, str]] = ()) -> list[tuple[str, str]]:
        """Run what can be run of a block, in order; returns the commands and what they printed."""
        if block.language == "python":
            script = self.path / "block.py"
            text = block.text
            for word, other in replace:
                text = text.replace(word, other)
            script.write_text(text)
            return [("python", self.run("python block.py"))]
        printed = []
        for command in block.commands:
            if re.search(SERVES, plain(command)) or cannot_run(command):
                continue
            for each in recipe(command) if command.startswith("make ") else [command]:
                printed.append((command, self.run(each, replace)))
        return printed


def recipe(command: str) -> list[str]:
    """What `make TARGET` runs beyond setting up, by make's own word."""
    shown = subprocess.run([*command.split(), "-n", "-o", "setup"], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in shown.stdout.replace("\\\n", " ").splitlines() if line.startswith(".venv/bin/")]
    assert lines, f"{command} has no recipe"
    return lines
