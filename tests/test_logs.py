from __future__ import annotations

import logging

import pytest

from twotower.logs import BoundedLog


def record(line: int, text: str = "%s came") -> logging.LogRecord:
    return logging.LogRecord("name", logging.WARNING, "file.py", line, text, ("x",), None)


def test_a_place_writes_its_burst_and_then_a_line_a_second() -> None:
    now = 0.0
    log = BoundedLog(burst=3, lines_a_second=1.0, clock=lambda: now)
    assert [log.filter(record(1)) for _ in range(5)] == [True] * 3 + [False] * 2
    assert log.filter(record(2))  # another place is another matter
    now = 1.0
    told = record(1)
    assert log.filter(told)
    assert told.getMessage() == "x came (and 2 like it before, not logged)"
    assert not log.filter(record(1))
    now = 1000.0
    assert [log.filter(record(1)) for _ in range(5)] == [True] * 3 + [False] * 2


def test_the_command_line_bounds_its_log(capfd: pytest.CaptureFixture[str]) -> None:
    import subprocess
    import sys

    code = (
        "import logging; from twotower.cli import main, services\n"
        "def run(args):\n"
        "    for i in range(10_000): logging.getLogger('x').error('line %d', i)\n"
        "main.services.run_gateway = run\n"
        "main.main(['gateway', '--checkpoint', '/'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert 10 <= len(done.stderr.splitlines()) < 50
