"""Turns between processes: in order, taken back from the dead, and no longer than patience allows."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from twotower.engine.turns import PATIENCE_S, Turns
from twotower.errors import ConfigError

HOLDER = """
import sys
from pathlib import Path
from twotower.engine.turns import Turns
turns = Turns(Path(sys.argv[1]))
turns.take()
print("has it", flush=True)
for line in sys.stdin:
    turns.give()
    if line.strip() == "again":
        turns.take()
    print("done", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "turns"
    path.touch()
    return path


@contextmanager
def _holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, whose turn it is."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "has it\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def _say(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdin is not None
    child.stdin.write(word + "\n")
    child.stdin.flush()


@contextmanager
def _taking(turns: Turns) -> Iterator[Callable[[], bool]]:
    """Take a turn in a thread; yields whether it has it."""
    thread = threading.Thread(target=turns.take, daemon=True)
    thread.start()
    yield lambda: not thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()


def test_alone_there_is_nothing_to_wait_for() -> None:
    turns = Turns(None)
    assert not turns.shared
    turns.take()
    turns.give()
    turns.close()


def test_a_turn_is_waited_for_until_it_is_given(path: Path) -> None:
    turns = Turns(path)
    assert turns.shared
    with _holder(path) as child, _taking(turns) as taken:
        time.sleep(0.05)
        assert not taken()
        _say(child, "give")
    turns.take()  # twice is once
    turns.give()
    with _holder(path):  # another can have it now
        pass
    turns.close()


def test_who_gives_and_takes_at_once_comes_behind_those_who_wait(path: Path) -> None:
    turns = Turns(path)
    with _holder(path) as child:
        with _taking(turns):
            time.sleep(0.05)  # it is next now
            _say(child, "again")
        assert child.stdout is not None
        turns.give()  # the child waits for this
        assert child.stdout.readline() == "done\n"
    turns.close()


def test_the_turn_of_a_dead_process_ends(path: Path) -> None:
    turns = Turns(path)
    with _holder(path) as child, _taking(turns):
        child.kill()
    turns.close()


def test_who_never_gives_is_not_waited_for_for_ever(path: Path) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    turns = Turns(path, sleep=sleep, clock=lambda: now)
    with _holder(path):
        turns.take()
        assert PATIENCE_S <= now < 1.1 * PATIENCE_S
        turns.give()
        turns.take()  # whoever is stuck is not waited for again
        assert now < 1.2 * PATIENCE_S
        turns.give()
    turns.take()
    turns.give()
    with _holder(path):  # but whoever has come since is
        turns.take()
        assert now >= 2 * PATIENCE_S
        turns.give()
    turns.close()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"turns: .*nowhere: No such file"):
        Turns(tmp_path / "nowhere")
