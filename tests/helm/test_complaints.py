"""What people complain about in charts of LLM servers, ten things, and how this one avoids each."""

from __future__ import annotations

import math
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support.charts import (
    CHART,
    FULLNAME,
    NAMESPACE,
    PROFILES,
    TOWERS,
    Object,
    container,
    deployment,
    environment,
    of_kind,
    pod,
    pods,
    profile,
    render,
)

PRODUCTION = profile("production")
GPU_ROLES = TOWERS

profiles = pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem.removesuffix("-values"))


# 1. Requests killed at scale-down.


@profiles
def test_requests_outlive_the_pod_that_is_told_to_end(file: Path) -> None:
    """test_containers.py ends a tower under load, and no request fails."""
    objects = render(file)
    for name, found in of_kind(objects, "Deployment").items():
        if name == "redis":
            continue
        spec = pod(found)
        one = spec["containers"][0]
        hook = one.get("lifecycle", {}).get("preStop", {"exec": {"command": ["sleep", "0"]}})
        drain = int(environment(one)["TWOTOWER_DRAIN"])
        assert spec["terminationGracePeriodSeconds"] >= int(hook["exec"]["command"][1]) + drain + 10
        assert one["command"][0] == "twotower"  # the service is process 1: no shell swallows SIGTERM
    gateway = container(objects, "gateway")
    assert int(gateway["lifecycle"]["preStop"]["exec"]["command"][1]) > 0  # until nobody sends it new requests


# 2. A rolling update that deadlocks for lack of GPUs, and 10. upgrades that need twice the GPUs.


def rolled(replicas: int, gpus: int, max_surge: int, max_unavailable: int) -> tuple[bool, int]:
    """(whether a rolling update of pods of one GPU ends, the most GPUs it used) on a cluster of `gpus`, by Kubernetes' rules.

    New pods are made while all pods are fewer than replicas + surge; old ones go while ready ones stay replicas - unavailable;
    a new pod becomes ready once it has a GPU.
    """
    old, new, waiting, most = replicas, 0, 0, replicas
    while old or new < replicas:
        before = old, new, waiting
        waiting += max(0, min(replicas + max_surge - old - new - waiting, replicas - new - waiting))
        placed = min(waiting, gpus - old - new)
        new, waiting = new + placed, waiting - placed
        most = max(most, old + new)
        old -= max(0, min(old, old + new - (replicas - max_unavailable)))
        if (old, new, waiting) == before:
            return False, most
    return True, most


def test_the_rule_finds_a_deadlock() -> None:
    """Kubernetes' own default, 25 % and 25 %, on one replica: surge 1, unavailable 0."""
    assert rolled(replicas=1, gpus=1, max_surge=1, max_unavailable=0) == (False, 1)
    assert rolled(replicas=2, gpus=4, max_surge=2, max_unavailable=0) == (True, 4)


@profiles
@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_an_upgrade_ends_without_a_spare_gpu(file: Path, replicas: int) -> None:
    objects = render(file)
    for role in GPU_ROLES:
        if role in of_kind(objects, "Deployment"):
            rolling = deployment(objects, role)["spec"]["strategy"]["rollingUpdate"]
            ended, most = rolled(replicas, replicas, rolling["maxSurge"], rolling["maxUnavailable"])
            assert ended
            assert most == replicas


@profiles
def test_a_budget_never_blocks_a_node_drain(file: Path) -> None:
    for budget in of_kind(render(file), "PodDisruptionBudget").values():
        assert budget["spec"]["maxUnavailable"] >= 1
        assert "minAvailable" not in budget["spec"]
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"  # not even by pods that never started


# 3. An unschedulable pod that freezes scale-down.


def autoscalers(objects: list[Object]) -> list[Object]:
    return [found for found in objects if found["kind"] in ("ScaledObject", "HorizontalPodAutoscaler")]


@pytest.mark.parametrize("kind", ["keda", "hpa"])
@pytest.mark.parametrize("trigger", ["metrics-api", "prometheus"])
def test_an_unschedulable_pod_changes_no_decision(kind: str, trigger: str) -> None:
    """
    Averages over pods (Resource, Pods) are not known for a pod that does not run, and the HPA then assumes the worst and stays
    as it is. An external value with an average target is divided by nothing but the target. Nor are there StatefulSets, whose
    pods wait for each other in order: a Deployment removes pods that do not run before others.
    """
    values = {"autoscaling": {"kind": kind, "trigger": trigger, "prometheus": {"serverAddress": "http://prometheus:9090"}}}
    objects = render(PRODUCTION, values=values)
    assert len(autoscalers(objects)) == 2
    for found in autoscalers(objects):
        if kind == "keda":
            for one in found["spec"]["triggers"]:
                assert one["type"] == trigger
                assert one["metricType"] == "AverageValue"
                assert float(one["metadata"].get("targetValue") or one["metadata"]["threshold"]) == 1
        else:
            assert [metric["type"] for metric in found["spec"]["metrics"]] == ["External"]
            (metric,) = found["spec"]["metrics"]
            assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "1"}
        assert wanted_by_hpa(wanted=3, target=1.0) == 3
    assert not of_kind(objects, "StatefulSet")


def wanted_by_hpa(wanted: float, target: float) -> int:
    """What the HPA makes of an external metric with an AverageValue target: pods, ready or not, do not come into it."""
    return math.ceil(wanted / target)


# 4. An autoscaler that kills busy workers.


@pytest.mark.parametrize("kind", ["keda", "hpa"])
def test_scaling_down_follows_the_brain_slowly_and_only_drains(kind: str) -> None:
    objects = render(PRODUCTION, values={"autoscaling": {"kind": kind}})
    for found in autoscalers(objects):
        spec = found["spec"]
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] if kind == "keda" else spec["behavior"]
        assert behavior["scaleDown"]["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 30}]
        assert behavior["scaleDown"]["stabilizationWindowSeconds"] >= 60
        assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
        text = str(found)
        assert not re.search(
            r"utilization|DCGM|gpu|lag|cpu", text, flags=re.IGNORECASE
        )  # a busy GPU says nothing about a backlog
    for role in TOWERS:  # nobody else sets their number, at each upgrade
        assert "replicas" not in deployment(objects, role)["spec"]
    assert deployment(objects, "gateway")["spec"]["replicas"] == 3


def test_a_gateway_that_does_not_answer_leaves_the_number_as_it_is() -> None:
    for found in autoscalers(render(PRODUCTION)):
        assert found["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"
        assert found["spec"]["fallback"]["replicas"] >= 1


# 5. Weights downloaded at every start.


def fetch_container(values: dict[str, Any]) -> Object:
    found: Object = pod(deployment(render(profile("two-gpus"), values=values), "denoiser"))["initContainers"][0]
    return found


def test_no_profile_downloads_weights_into_a_pod() -> None:
    """They are in an image, in a claim, or in a cache that outlives the pod."""
    for file in PROFILES:
        for name, spec in pods(render(file)):
            short_lived = {volume["name"] for volume in spec.get("volumes", ()) if "emptyDir" in volume}
            for one in spec.get("initContainers", ()):
                target = next(mount["name"] for mount in one["volumeMounts"] if mount["mountPath"] == "/checkpoints")
                assert target not in short_lived, name


def test_weights_are_fetched_once_whoever_starts(tmp_path: Path) -> None:
    """The rendered script, at once and again: one download; and what was cut off in the middle never counts."""
    counting = 'echo x >> "$COUNT"; sleep 0.3; echo weights > "$TARGET/model.safetensors"'
    one = fetch_container({"checkpoint": {"fetch": {"command": ["sh", "-c", counting]}}})
    environ = {"PATH": "/usr/bin:/bin", "COUNT": str(tmp_path / "count")}
    environ |= {name: str(value).replace("/checkpoints", str(tmp_path)) for name, value in environment(one).items()}

    def start() -> int:
        return subprocess.run(one["command"], env=environ, capture_output=True, check=False).returncode

    partial = tmp_path / f".{environ['REVISION']}.partial"
    partial.mkdir()
    (partial / "half").touch()
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(start())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert start() == 0
    assert codes == [0] * 4
    assert (tmp_path / "count").read_text() == "x\n"
    place = tmp_path / environ["REVISION"]
    assert [path.name for path in place.iterdir()] == ["model.safetensors"]
    assert not partial.exists()


def test_a_download_that_fails_leaves_nothing_that_counts(tmp_path: Path) -> None:
    one = fetch_container({"checkpoint": {"fetch": {"command": ["sh", "-c", 'echo half > "$TARGET/a"; exit 7']}}})
    environ = {"PATH": "/usr/bin:/bin"}
    environ |= {name: str(value).replace("/checkpoints", str(tmp_path)) for name, value in environment(one).items()}
    assert subprocess.run(one["command"], env=environ, check=False).returncode == 7
    assert not (tmp_path / environ["REVISION"]).exists()


# 6. ClusterRoles demanded in restricted namespaces.


@profiles
def test_nothing_beyond_the_namespace_is_asked_for(file: Path) -> None:
    for found in render(file):
        assert found["metadata"]["namespace"] == NAMESPACE
        assert not re.search(r"Role|Binding|Webhook|Namespace|StorageClass|PriorityClass|PersistentVolume$", found["kind"])


def test_a_namespace_where_nobody_may_make_accounts_is_enough() -> None:
    objects = render(profile("restricted"))
    assert not of_kind(objects, "ServiceAccount")
    assert all(spec["serviceAccountName"] == "default" for _, spec in pods(objects))


# 7. CRD conversions that break upgrades.


def test_there_are_no_definitions_of_our_own_to_convert() -> None:
    assert not (CHART / "crds").exists()
    for file in PROFILES:
        objects = render(file)
        assert not [found for found in objects if found["kind"] == "CustomResourceDefinition"]
    names = {found["apiVersion"] for file in PROFILES for found in render(file)}
    ours = {"v1", "apps/v1", "policy/v1", "networking.k8s.io/v1", "autoscaling/v2"}
    others = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1", "gateway.networking.k8s.io/v1"}
    assert names <= ours | others
    assert {found["apiVersion"] for found in render()} <= ours  # others' only where they are asked for


def test_what_selects_pods_never_changes_with_a_version_or_a_label() -> None:
    """A Deployment's selector cannot be changed: an upgrade that tries fails."""
    for name, found in of_kind(render(values={"commonLabels": {"team": "a"}}), "Deployment").items():
        assert set(found["spec"]["selector"]["matchLabels"]) == {
            "app.kubernetes.io/name",
            "app.kubernetes.io/instance",
            "app.kubernetes.io/component",
        }, name


# 8. Pods pending on unbound volumes.


@profiles
def test_no_pod_waits_for_a_claim_that_nobody_named(file: Path) -> None:
    """The chart makes no claim, so that none can stay unbound: those that pods mount are named by whoever installs it."""
    objects = render(file)
    assert not of_kind(objects, "PersistentVolumeClaim")
    given = {"ar-one-gpu": {"models"}, "restricted": {"models"}, "air-gapped": {"model-cache"}}
    for name, found in of_kind(objects, "Deployment").items():
        assert "volumeClaimTemplates" not in found["spec"]
        claims = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in pod(found).get("volumes", ())
            if "persistentVolumeClaim" in volume
        }
        assert claims <= given.get(file.stem.removesuffix("-values"), set()), name


# 9. Metrics that a trigger's labels never match.


def scraped_labels(objects: list[Object]) -> dict[str, str]:
    """What Prometheus' operator puts on the series of the gateway: the namespace, and as job the Service's name."""
    monitor = of_kind(objects, "ServiceMonitor")["gateway"]
    assert "jobLabel" not in monitor["spec"]
    selected = [
        found
        for found in of_kind(objects, "Service").values()
        if monitor["spec"]["selector"]["matchLabels"].items() <= found["metadata"]["labels"].items()
    ]
    (service,) = selected
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    return {"namespace": service["metadata"]["namespace"], "job": service["metadata"]["name"]}


def test_triggers_ask_for_the_labels_that_the_monitor_gives() -> None:
    values = {"autoscaling": {"trigger": "prometheus", "prometheus": {"serverAddress": "http://prometheus:9090"}}}
    objects = render(PRODUCTION, values=values)
    labels = scraped_labels(objects)
    for name, found in of_kind(objects, "ScaledObject").items():
        (trigger,) = found["spec"]["triggers"]
        matched = re.fullmatch(rf"max\(twotower_{name}s_wanted\{{(.*)\}}\)", trigger["metadata"]["query"])
        assert matched is not None
        assert dict(re.findall(r'(\w+)="([^"]*)"', matched[1])) == labels
    for name, found in of_kind(render(PRODUCTION, values={"autoscaling": {"kind": "hpa"}}), "HorizontalPodAutoscaler").items():
        metric = found["spec"]["metrics"][0]["external"]["metric"]
        assert metric == {"name": f"twotower_{name}s_wanted", "selector": {"matchLabels": labels}}


def test_the_trigger_without_prometheus_asks_a_service_and_a_port_that_are_there() -> None:
    objects = render(PRODUCTION)
    for name, found in of_kind(objects, "ScaledObject").items():
        (trigger,) = found["spec"]["triggers"]
        port = of_kind(objects, "Service")["gateway"]["spec"]["ports"][0]["port"]
        assert trigger["metadata"]["url"] == f"http://{FULLNAME}-gateway.{NAMESPACE}.svc:{port}/v1/pool"
        assert trigger["metadata"]["valueLocation"] == f"{name}s.wanted"
        assert found["spec"]["scaleTargetRef"]["name"] == f"{FULLNAME}-{name}"


@profiles
def test_monitors_select_pods_and_ports_that_are_there(file: Path) -> None:
    objects = render(file)
    for name, monitor in of_kind(objects, "PodMonitor").items():
        template = deployment(objects, name)["spec"]["template"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in {port["name"] for port in container(objects, name)["ports"]}
