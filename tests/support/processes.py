"""The command line as a user runs it: real processes, ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

START_S = 90
ORPHAN_S = 10


def run_cli(*words: object, stdin: str | None = None, timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    """`twotower WORDS`, to its end."""
    argv = [sys.executable, "-m", "twotower.cli.main", *map(str, words)]
    return subprocess.run(argv, input=stdin or "", capture_output=True, text=True, timeout=timeout_s, check=False)


class Up:
    """A running `twotower up`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log: list[str] = []
        self.out: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((process.stdout, self.out), (process.stderr, self.log))
        ]
        for reader in self._readers:
            reader.start()
        self.grpc = self.http = ""

    @staticmethod
    def _read(stream: object, lines: list[str]) -> None:
        for line in stream:  # type: ignore[attr-defined]
            lines.append(line.rstrip())

    def wait_ready(self) -> None:
        """Until its ready line."""
        deadline = time.monotonic() + START_S
        while not self.out:
            assert self.process.poll() is None, "\n".join(self.log)
            assert time.monotonic() < deadline, "\n".join(self.log)
            time.sleep(0.02)
        word, grpc, http = self.out[0].split()
        assert word == "ready"
        self.grpc, self.http = grpc.removeprefix("grpc="), http.removeprefix("http=")

    def children(self) -> dict[int, str]:
        """Pids of its services and Redis, with their command lines."""
        return {pid: command for pid, (parent, command) in _processes().items() if parent == self.process.pid}

    def child(self, kind: str) -> int:
        """Pid of one service of a kind."""
        return next(pid for pid, command in self.children().items() if f"twotower.cli.main {kind} " in command)

    def of_kind(self, kind: str) -> list[int]:
        """Pids of all services of a kind: gateway, context, denoiser; or of Redis."""
        sign = "valkey-server" if kind == "redis" else f"twotower.cli.main {kind} "
        return sorted(pid for pid, command in self.children().items() if sign in command)

    def terminate(self) -> int:
        """SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def up(checkpoint: Path, *options: object, env: Mapping[str, str] | None = None) -> Iterator[Up]:
    """A stack on free ports that is ready; killed at the end if it still runs, and its children with it.

    `env`: what its environment has beyond ours.
    """
    argv = [sys.executable, "-m", "twotower.cli.main", "up", "--checkpoint", str(checkpoint)]
    ports = ["--grpc-port", "0", "--http-port", "0"]
    process = subprocess.Popen(
        [*argv, *ports, *map(str, options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )
    running = Up(process)
    try:
        running.wait_ready()
        yield running
    finally:
        children = running.children()
        if process.poll() is None:
            process.kill()
        process.wait()
        deadline = time.monotonic() + ORPHAN_S
        while alive(children) and time.monotonic() < deadline:  # they end by themselves, and clean up
            time.sleep(0.02)
        for pid in alive(children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for reader in running._readers:
            reader.join(5)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def alive(pids: object) -> set[int]:
    """Which of these processes still run (and are no zombies)."""
    return {pid for pid in pids if pid in _processes()}  # type: ignore[attr-defined]


def environment(pid: int) -> dict[str, str]:
    """Of a process of ours."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def _processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent, command line) of all processes that run."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            if stat[0] != "Z":
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(entry.name)] = (int(stat[1]), command)
    return found
