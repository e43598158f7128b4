"""Every container of a profile is started for real, as it was rendered, until its probes pass and a request is answered."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.charts import ROLES, TOWERS, Object, container, deployment, environment, of_kind, profile, render
from tests.support.kubelet import Node, Running, free_ports, node
from tests.support.redis_server import embedded_redis
from twotower.rpc.server import LIVENESS
from twotower.service.config import DEFAULT_CHECKPOINT

PROMPT = "Tom owns 12 pens. On Friday he buys 6 more. On Saturday he loses 4 of them. How many pens does Tom have?"
SMALL = {"kernels": "torch", "dtype": "float32", "state_memory": "256M"}
"""No compiler is waited for."""


def here(http: int, grpc: int, redis: int) -> dict[str, Any]:
    """What differs on this machine from the cluster that a profile is for: free ports, no GPU, the checkpoint that ships."""
    tower = {"gpu": {"count": 0}, "settings": SMALL}
    return {
        "gateway": {"ports": {"http": http, "grpc": grpc}},
        "context": tower,
        "denoiser": tower,
        "redis": {"bundled": {"port": redis}},
        "test": {"maxTokens": 16},
    }


def fetched(source: str) -> dict[str, Any]:
    """The checkpoint that ships, by the way by which a profile gets its own."""
    if source == "fetch":
        return {"checkpoint": {"fetch": {"command": ["cp", "-r", f"{DEFAULT_CHECKPOINT}/.", "$(TARGET)"], "env": []}}}
    return {"checkpoint": {"source": "shipped"}} if source == "image" else {}


def complete(gateway: Running, **body: Any) -> Any:
    """A completion over HTTP."""
    url = f"http://127.0.0.1:{gateway.ports['http']}/v1/completions"
    request = urllib.request.Request(url, json.dumps({"prompt": PROMPT, "max_tokens": 64, **body}).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def started(running: Node, *roles: str) -> dict[str, Running]:
    """Containers of these roles, once their probes for start and readiness pass."""
    found = {role: running.start(deployment(running.objects, role)) for role in roles}
    for one in found.values():
        one.wait("startupProbe")
    for one in found.values():
        one.wait("readinessProbe")
    return found


def run_helm_test(running: Node) -> Any:
    """What the hook's container prints."""
    (hook,) = (found for found in running.objects if found["kind"] == "Pod")
    one = running.start(hook)
    assert one.process.wait(120) == 0, one.text()
    return json.loads(one.text().splitlines()[-1])


@pytest.mark.parametrize(
    "name",
    ["cpu-tryout", *(pytest.param(n, marks=pytest.mark.chart) for n in ("two-gpus", "ar-one-gpu", "air-gapped", "restricted"))],
)
def test_a_profile_runs(name: str, tmp_path: Path) -> None:
    http, grpc, redis = free_ports(3)
    values = here(http, grpc, redis)
    source = {"two-gpus": "fetch", "air-gapped": "fetch", "ar-one-gpu": "pvc", "restricted": "pvc"}.get(name, "shipped")
    objects = render(profile(name), values={**values, **fetched(source)})
    disk = tmp_path / "disk"
    disk.mkdir()
    claims = {"models": DEFAULT_CHECKPOINT.parent, "model-cache": disk, "/var/cache/twotower": disk}
    if name == "ar-one-gpu":
        objects = render(profile(name), values={**values, "checkpoint": {"pvc": {"subPath": DEFAULT_CHECKPOINT.name}}})
    if name == "restricted":
        claims["models"] = DEFAULT_CHECKPOINT
    secrets = {"twotower-valkey": {"redis-password": "a-password-of-letters"}, "hugging-face": {"token": "t"}}
    roles = [role for role in ROLES if role in of_kind(objects, "Deployment")]
    with node(objects, tmp_path, secrets=secrets, host_paths=claims) as running:
        stack = started(running, "redis")
        stack |= started(running, *roles)
        reply = complete(stack["gateway"])
        assert reply["choices"][0]["text"].endswith("14.")
        assert run_helm_test(running)["forwards"] > 0
        for one in stack.values():
            assert one.probe("livenessProbe")
            assert one.process.poll() is None
        if source == "fetch":
            assert [path.name for path in disk.iterdir() if path.is_dir()] == ["nemotron-twotower-30b-a3b"]
        for role in reversed(roles):
            assert stack[role].stop() == 0, stack[role].text()


@pytest.mark.chart
async def test_the_profile_for_production_runs_with_a_redis_of_ones_own(tmp_path: Path) -> None:
    import asyncio

    http, grpc, redis = free_ports(3)
    objects = render(profile("production"), values={**here(http, grpc, redis), **fetched("image")})
    assert "redis" not in of_kind(objects, "Deployment")
    async with embedded_redis() as server:
        secrets = {"twotower-redis": {"redis-url": server.url}}

        def run() -> None:
            with node(objects, tmp_path, secrets=secrets) as running:
                stack = started(running, *ROLES)
                for one in stack.values():
                    assert server.url not in one.environ.values()  # it came by a file
                assert complete(stack["gateway"])["choices"][0]["text"].endswith("14.")
                for scaled in of_kind(objects, "ScaledObject").values():
                    (trigger,) = scaled["spec"]["triggers"]
                    assert as_keda_reads_it(trigger, stack["gateway"]) == 2  # both bounds below are 2, and nothing waits
                for role in reversed(ROLES):
                    assert stack[role].stop() == 0, stack[role].text()

        await asyncio.to_thread(run)


def as_keda_reads_it(trigger: Any, gateway: Running) -> float:
    """The number that a trigger of the kind metrics-api finds."""
    found: Any = json.loads(fetch(gateway.rewrite(trigger["metadata"]["url"])))
    for name in trigger["metadata"]["valueLocation"].split("."):
        found = found[name]
    assert isinstance(found, int | float)
    return found


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode())


@pytest.mark.chart
def test_metrics_are_where_the_monitors_look_for_them(tmp_path: Path) -> None:
    http, grpc, redis = free_ports(3)
    values = {**here(http, grpc, redis), "monitoring": {"enabled": True}}
    objects = render(profile("cpu-tryout"), values=values)
    with node(objects, tmp_path) as running:
        stack = started(running, "redis")
        stack |= started(running, *ROLES)
        complete(stack["gateway"])
        monitors = {**of_kind(objects, "PodMonitor"), **of_kind(objects, "ServiceMonitor")}
        assert set(monitors) == set(ROLES)
        for role, monitor in monitors.items():
            (endpoint,) = monitor["spec"].get("podMetricsEndpoints") or monitor["spec"]["endpoints"]
            one = stack[role]
            text = fetch(f"http://{one.address}:{one.ports[endpoint['port']]}{endpoint['path']}")
            sign = {"gateway": "twotower_denoisers_wanted 1.0", "context": "twotower_prefix_", "denoiser": "twotower_denoiser_"}
            assert sign[role] in text


class Load:
    """Requests one after the other from several clients, until it is told to end."""

    def __init__(self, gateway: Running, clients: int) -> None:
        self.texts: list[str] = []
        self.failed: list[str] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(gateway,)) for _ in range(clients)]

    def _ask(self, gateway: Running) -> None:
        while not self._ended.is_set():
            try:
                self.texts.append(complete(gateway)["choices"][0]["text"])
            except OSError as error:
                self.failed.append(str(error))

    def wait_for(self, texts: int) -> None:
        """Until so many requests were answered, or one failed."""
        deadline = time.monotonic() + 120
        while len(self.texts) < texts and not self.failed:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("role", ["denoiser", pytest.param("context", marks=pytest.mark.chart)])
def test_scaling_a_tower_down_under_load_fails_no_request(role: str, tmp_path: Path) -> None:
    http, grpc, redis = free_ports(3)
    objects = render(profile("cpu-tryout"), values=here(http, grpc, redis))
    with node(objects, tmp_path) as running:
        stack = started(running, "redis")
        stack |= started(running, *ROLES)
        second = started(running, role)[role]
        calm = complete(stack["gateway"])["choices"][0]["text"]
        with Load(stack["gateway"], 4) as load:
            load.wait_for(4)
            assert stack[role].stop() == 0, stack[role].text()  # not killed: its grace was long enough
            load.wait_for(len(load.texts) + 4)
        assert not load.failed, second.text()
        assert set(load.texts) == {calm}


def test_a_tower_that_takes_no_work_is_not_killed_for_it() -> None:
    """It is not ready, and alive: a probe that took one for the other would kill a tower that drains."""
    for role in TOWERS:
        probes = container(render(), role)
        assert probes["livenessProbe"]["grpc"]["service"] == LIVENESS
        assert "service" not in probes["readinessProbe"]["grpc"]


@pytest.mark.parametrize("role", ROLES)
def test_a_grace_period_is_longer_than_what_it_is_for(role: str) -> None:
    objects: list[Object] = render(values={role: {"drainSeconds": 200, "preStopSeconds": 7}})
    spec = deployment(objects, role)["spec"]["template"]["spec"]
    assert spec["terminationGracePeriodSeconds"] >= 200 + 7 + 10
    assert environment(container(objects, role))["TWOTOWER_DRAIN"] == "200"
    assert container(objects, role)["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
