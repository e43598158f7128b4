"""Ways out: Ctrl-C, a reader that leaves, a bug."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.processes import up
from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from twotower.cli import conformance
from twotower.cli.main import main

ENDLESS = ("generate", "the fox", "--max-tokens", "4000", "--gamma", "1", "--no-eos")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(path)
    return path


def _start(*words: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "twotower.cli.main", *ENDLESS, *words]
    # Whoever started the tests, maybe in the background of a shell, may have had Ctrl-C ignored.
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=_heed_ctrl_c)


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupted(*words: str) -> None:
    process = _start(*words)
    assert process.stdout is not None
    assert process.stdout.read(1)  # in the middle of it
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")


def test_ctrl_c_in_one_process(checkpoint: Path) -> None:
    _interrupted("--local", "--threads", "1", "--checkpoint", str(checkpoint))


def test_ctrl_c_and_a_reader_that_leaves(checkpoint: Path) -> None:
    with up(checkpoint) as stack:
        _interrupted("--target", stack.grpc)
        process = _start("--target", stack.grpc)
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()  # as `| head` does
        assert (process.wait(60), process.stderr.read()) == (1, b"")
        process.stderr.close()


def test_a_bug_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*words: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(conformance, "check_at_least_one", fail)
    assert main(["conformance", "."]) == 1
    assert capsys.readouterr().err == (
        "error: internal error: ZeroDivisionError('oops') (`twotower --debug ...` shows where)\n"
    )
    with pytest.raises(ZeroDivisionError):
        main(["--debug", "conformance", "."])
