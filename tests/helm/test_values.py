"""What each value changes: one line a value, and none without a line."""

# ruff: noqa: E501 (one line a value)

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.helm.test_schema import ALL, nested
from tests.support.charts import ROLES, Object, RenderError, container, deployment, environment, of_kind, pod, render

Rendered = list[Object]


@dataclass(frozen=True)
class Change:
    """A value that is not the default, and where it shows."""

    value: Any
    shows: Callable[[Rendered], Any]
    expected: Any
    beside: dict[str, Any] = field(default_factory=dict)
    """Other values, without which it says nothing."""


def spec_of(role: str) -> Callable[[Rendered], Object]:
    return lambda objects: pod(deployment(objects, role))


def key(role: str, *path: str) -> Callable[[Rendered], Any]:
    """Of a role's pod."""

    def find(objects: Rendered) -> Any:
        found: Any = pod(deployment(objects, role))
        for name in path:
            found = found.get(name)
        return found

    return find


def one(role: str, name: str) -> Callable[[Rendered], Any]:
    """Of a role's container."""
    return lambda objects: container(objects, role)[name]


def variable(role: str, name: str) -> Callable[[Rendered], Any]:
    return lambda objects: environment(container(objects, role))[name]


def of(kind: str, name: str, *path: Any) -> Callable[[Rendered], Any]:
    def find(objects: Rendered) -> Any:
        found: Any = of_kind(objects, kind)[name]
        for step in path:
            found = found[step]
        return found

    return find


def holds(find: Callable[[Rendered], Any], item: Any) -> Callable[[Rendered], bool]:
    """Whether a list has an item, or a map those of another."""

    def check(objects: Rendered) -> bool:
        found = find(objects)
        return bool(item.items() <= found.items()) if isinstance(found, dict) else item in found

    return check


def names(kind: str) -> Callable[[Rendered], set[str]]:
    return lambda objects: set(of_kind(objects, kind))


def volume(role: str) -> Callable[[Rendered], Any]:
    return lambda objects: next((one for one in pod(deployment(objects, role))["volumes"] if one["name"] == "checkpoint"), None)


def fetcher(objects: Rendered) -> Object:
    found: Object = pod(deployment(objects, "context"))["initContainers"][-1]
    return found


def hook(objects: Rendered) -> list[str]:
    """The command of the release's test."""
    (found,) = (pod(one) for one in objects if one["kind"] == "Pod")
    command: list[str] = found["containers"][0]["command"]
    return command


FETCH = {"checkpoint": {"source": "fetch", "revision": "r1", "fetch": {"command": ["true"]}}}
IMAGE = {"checkpoint": {"source": "image", "image": {"reference": "models/a:1"}}}
CLAIM = {"checkpoint": {"source": "pvc", "pvc": {"claimName": "c"}}}
EXTERNAL = {"redis": {"mode": "external", "external": {"url": "redis://r:6379"}}}
SECRET = {"redis": {"mode": "external", "external": {"existingSecret": "s"}}}
KEDA = {"autoscaling": {"kind": "keda"}}
BY_PROMETHEUS = {"autoscaling": {"kind": "keda", "trigger": "prometheus", "prometheus": {"serverAddress": "http://p"}}}
INGRESS = {"ingress": {"enabled": True, "hosts": ["a"]}}
ROUTES = {"gatewayApi": {"enabled": True, "parentRefs": [{"name": "g"}]}}
MONITORED = {"monitoring": {"enabled": True}}
DIGEST = "sha256:" + "a" * 64
RULE: list[Object] = [{"namespaceSelector": {}}]
TRIGGER = ("spec", "triggers", 0, "metadata")
BEHAVIOR = ("spec", "advanced", "horizontalPodAutoscalerConfig", "behavior")

CHANGES: dict[str, Change] = {
    "nameOverride": Change("x", of("Deployment", "tt-x-gateway", "metadata", "labels", "app.kubernetes.io/name"), "x"),
    "fullnameOverride": Change("whole", holds(names("Service"), "whole-gateway"), True),
    "commonLabels": Change({"team": "a"}, holds(of("Service", "redis", "metadata", "labels"), {"team": "a"}), True),
    "commonAnnotations": Change({"a": "b"}, of("Deployment", "context", "metadata", "annotations"), {"a": "b"}),
    "image.repository": Change("reg/tt", one("gateway", "image"), "reg/tt:0.1.0-cpu"),
    "image.tag": Change("7", one("denoiser", "image"), "ghcr.io/twotower/twotower:7"),
    "image.digest": Change(DIGEST, one("context", "image"), f"ghcr.io/twotower/twotower@{DIGEST}"),
    "image.pullPolicy": Change("Always", one("gateway", "imagePullPolicy"), "Always"),
    "image.pullSecrets": Change(["s"], key("redis", "imagePullSecrets"), [{"name": "s"}]),
    "settings": Change({"experts": "fp8", "stall": 1000000}, variable("context", "TWOTOWER_STALL"), "1000000"),
    "extraEnv": Change([{"name": "A", "value": "b"}], variable("gateway", "A"), "b"),
    "checkpoint.source": Change("image", volume("context"), {"name": "checkpoint", "image": {"reference": "m", "pullPolicy": "IfNotPresent"}}, {"checkpoint": {"image": {"reference": "m"}}}),
    "checkpoint.revision": Change("r2", variable("denoiser", "TWOTOWER_REVISION"), "r2"),
    "checkpoint.modelName": Change("m", variable("gateway", "TWOTOWER_MODEL_NAME"), "m"),
    "checkpoint.pvc.claimName": Change("mine", volume("gateway"), {"name": "checkpoint", "persistentVolumeClaim": {"claimName": "mine", "readOnly": True}}, CLAIM),
    "checkpoint.pvc.subPath": Change("a/b", holds(one("context", "volumeMounts"), {"name": "checkpoint", "mountPath": "/checkpoint", "readOnly": True, "subPath": "a/b"}), True, CLAIM),
    "checkpoint.image.reference": Change("other", lambda objects: volume("context")(objects)["image"]["reference"], "other", IMAGE),
    "checkpoint.image.pullPolicy": Change("Never", lambda objects: volume("context")(objects)["image"]["pullPolicy"], "Never", IMAGE),
    "checkpoint.image.directory": Change("models", variable("context", "TWOTOWER_CHECKPOINT"), "/checkpoint/models", IMAGE),
    "checkpoint.fetch.image": Change("tools:1", lambda objects: fetcher(objects)["image"], "tools:1", FETCH),
    "checkpoint.fetch.command": Change(["get", "it"], lambda objects: fetcher(objects)["command"][-2:], ["get", "it"], FETCH),
    "checkpoint.fetch.env": Change([{"name": "A", "value": "b"}], lambda objects: environment(fetcher(objects))["A"], "b", FETCH),
    "checkpoint.fetch.resources": Change({"limits": {"cpu": 1}}, lambda objects: fetcher(objects)["resources"], {"limits": {"cpu": 1}}, FETCH),
    "checkpoint.fetch.cache.kind": Change("pvc", lambda objects: volume("context")(objects)["persistentVolumeClaim"], {"claimName": "c"}, {"checkpoint": {**FETCH["checkpoint"], "fetch": {"command": ["true"], "cache": {"claimName": "c"}}}}),
    "checkpoint.fetch.cache.hostPath": Change("/data", lambda objects: volume("context")(objects)["hostPath"]["path"], "/data", FETCH),
    "checkpoint.fetch.cache.claimName": Change("d", lambda objects: volume("context")(objects)["persistentVolumeClaim"], {"claimName": "d"}, {"checkpoint": {**FETCH["checkpoint"], "fetch": {"command": ["true"], "cache": {"kind": "pvc"}}}}),
    "redis.mode": Change("external", variable("context", "TWOTOWER_REDIS_URL"), "redis://r:6379", EXTERNAL),
    "redis.external.url": Change("rediss://q:6380", variable("gateway", "TWOTOWER_REDIS_URL"), "rediss://q:6380", EXTERNAL),
    "redis.external.existingSecret": Change("t", variable("gateway", "TWOTOWER_REDIS_URL_FILE"), "/run/secrets/twotower/redis/redis-url", EXTERNAL),
    "redis.external.secretKey": Change("k", variable("gateway", "TWOTOWER_REDIS_URL_FILE"), "/run/secrets/twotower/redis/k", SECRET),
    "redis.external.port": Change(6380, holds(of("NetworkPolicy", "gateway", "spec", "egress"), {"ports": [{"port": 6380, "protocol": "TCP"}]}), True, EXTERNAL),
    "redis.bundled.image.repository": Change("v", one("redis", "image"), "v:8.1-alpine"),
    "redis.bundled.image.tag": Change("9", one("redis", "image"), "docker.io/valkey/valkey:9"),
    "redis.bundled.image.digest": Change(DIGEST, one("redis", "image"), f"docker.io/valkey/valkey@{DIGEST}"),
    "redis.bundled.image.pullPolicy": Change("Never", one("redis", "imagePullPolicy"), "Never"),
    "redis.bundled.port": Change(7000, variable("denoiser", "TWOTOWER_REDIS_URL"), "redis://tt-twotower-redis:7000"),
    "redis.bundled.auth.existingSecret": Change("p", variable("context", "REDIS_PASSWORD"), {"secretKeyRef": {"name": "p", "key": "redis-password"}}),
    "redis.bundled.auth.secretKey": Change("k", variable("redis", "REDIS_PASSWORD"), {"secretKeyRef": {"name": "p", "key": "k"}}, {"redis": {"bundled": {"auth": {"existingSecret": "p"}}}}),
    "redis.bundled.maxMemory": Change("4gb", variable("redis", "MAX_MEMORY"), "4gb"),
    "redis.bundled.resources": Change({"limits": {"memory": "9Gi"}}, holds(lambda objects: container(objects, "redis")["resources"]["limits"], {"memory": "9Gi"}), True),
    "redis.bundled.nodeSelector": Change({"a": "b"}, key("redis", "nodeSelector"), {"a": "b"}),
    "redis.bundled.tolerations": Change([{"operator": "Exists"}], key("redis", "tolerations"), [{"operator": "Exists"}]),
    "redis.bundled.affinity": Change({"podAffinity": {}}, key("redis", "affinity"), {"podAffinity": {}}),
    "redis.bundled.priorityClassName": Change("high", key("redis", "priorityClassName"), "high"),
    "redis.bundled.podLabels": Change({"a": "b"}, holds(of("Deployment", "redis", "spec", "template", "metadata", "labels"), {"a": "b"}), True),
    "redis.bundled.podAnnotations": Change({"a": "b"}, holds(of("Deployment", "redis", "spec", "template", "metadata", "annotations"), {"a": "b"}), True),
    "serviceAccount.create": Change(False, names("ServiceAccount"), set()),
    "serviceAccount.name": Change("robot", key("context", "serviceAccountName"), "robot"),
    "serviceAccount.annotations": Change({"a": "b"}, lambda objects: next(o for o in objects if o["kind"] == "ServiceAccount")["metadata"]["annotations"], {"a": "b"}),
    "podSecurityContext": Change({"runAsUser": 7}, holds(key("redis", "securityContext"), {"runAsUser": 7}), True),
    "securityContext": Change({"runAsUser": 8}, holds(one("gateway", "securityContext"), {"runAsUser": 8}), True),
    "gateway.ports.http": Change(80, lambda objects: of("Service", "gateway", "spec", "ports")(objects)[0]["port"], 80),
    "gateway.ports.grpc": Change(81, variable("gateway", "TWOTOWER_GRPC_PORT"), "81"),
    "gateway.listen": Change("::", variable("gateway", "TWOTOWER_HOST"), "::"),
    "gateway.service.type": Change("LoadBalancer", of("Service", "gateway", "spec", "type"), "LoadBalancer"),
    "gateway.service.annotations": Change({"a": "b"}, of("Service", "gateway", "metadata", "annotations"), {"a": "b"}),
    "denoiser.enabled": Change(False, names("Deployment"), {"gateway", "context", "redis"}),
    "autoscaling.kind": Change("hpa", names("HorizontalPodAutoscaler"), {"context", "denoiser"}),
    "autoscaling.trigger": Change("prometheus", of("ScaledObject", "context", "spec", "triggers", 0, "type"), "prometheus", BY_PROMETHEUS),
    "autoscaling.prometheus.serverAddress": Change("http://q", of("ScaledObject", "context", *TRIGGER, "serverAddress"), "http://q", BY_PROMETHEUS),
    "autoscaling.prometheus.authenticationRef": Change("a", of("ScaledObject", "context", "spec", "triggers", 0, "authenticationRef"), {"name": "a"}, BY_PROMETHEUS),
    "autoscaling.pollingIntervalSeconds": Change(5, of("ScaledObject", "context", "spec", "pollingInterval"), 5, KEDA),
    "autoscaling.cooldownSeconds": Change(7, of("ScaledObject", "context", "spec", "cooldownPeriod"), 7, KEDA),
    "autoscaling.scaleDownStabilizationSeconds": Change(9, of("ScaledObject", "denoiser", *BEHAVIOR, "scaleDown", "stabilizationWindowSeconds"), 9, KEDA),
    "networkPolicy.enabled": Change(False, names("NetworkPolicy"), set()),
    "networkPolicy.gatewayFrom": Change(RULE, lambda objects: of("NetworkPolicy", "gateway", "spec", "ingress", 0, "from", 0)(objects), RULE[0]),
    "networkPolicy.metricsFrom": Change([{"ipBlock": {"cidr": "10.0.0.0/8"}}], of("NetworkPolicy", "denoiser", "spec", "ingress", 1, "from"), [{"ipBlock": {"cidr": "10.0.0.0/8"}}]),
    "networkPolicy.extraEgress": Change([{"ports": [{"port": 4317}]}], holds(of("NetworkPolicy", "context", "spec", "egress"), {"ports": [{"port": 4317}]}), True),
    "ingress.enabled": Change(True, names("Ingress"), {"gateway"}, {"ingress": {"hosts": ["a"]}}),
    "ingress.className": Change("nginx", of("Ingress", "gateway", "spec", "ingressClassName"), "nginx", INGRESS),
    "ingress.annotations": Change({"a": "b"}, of("Ingress", "gateway", "metadata", "annotations"), {"a": "b"}, INGRESS),
    "ingress.hosts": Change(["b"], of("Ingress", "gateway", "spec", "rules", 0, "host"), "b", INGRESS),
    "ingress.tls": Change([{"secretName": "t"}], of("Ingress", "gateway", "spec", "tls"), [{"secretName": "t"}], INGRESS),
    "gatewayApi.enabled": Change(True, names("HTTPRoute"), {"gateway"}, {"gatewayApi": {"parentRefs": [{"name": "g"}]}}),
    "gatewayApi.parentRefs": Change([{"name": "h"}], of("GRPCRoute", "gateway", "spec", "parentRefs"), [{"name": "h"}], ROUTES),
    "gatewayApi.hostnames": Change(["h"], of("HTTPRoute", "gateway", "spec", "hostnames"), ["h"], ROUTES),
    "gatewayApi.grpc": Change(False, names("GRPCRoute"), set(), ROUTES),
    "gatewayApi.requestTimeout": Change("30s", of("HTTPRoute", "gateway", "spec", "rules", 0, "timeouts", "request"), "30s", ROUTES),
    "monitoring.enabled": Change(True, names("PodMonitor"), {"context", "denoiser"}),
    "monitoring.labels": Change({"a": "b"}, holds(of("ServiceMonitor", "gateway", "metadata", "labels"), {"a": "b"}), True, MONITORED),
    "monitoring.interval": Change("5s", of("PodMonitor", "context", "spec", "podMetricsEndpoints", 0, "interval"), "5s", MONITORED),
    "monitoring.rules": Change(True, lambda objects: [o["kind"] for o in objects if o["kind"] == "PrometheusRule"], ["PrometheusRule"], MONITORED),
    "test.prompt": Change("Hello", lambda objects: hook(objects)[2], "Hello"),
    "test.maxTokens": Change(5, lambda objects: hook(objects)[hook(objects).index("--max-tokens") + 1], "5"),
    "extraObjects": Change([{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "{{ .Release.Name }}-s"}}], names("Secret"), {"tt-s"}),
}  # fmt: skip


def for_role(role: str) -> dict[str, Change]:
    """Values that all roles have."""
    toleration, constraint = (
        [{"operator": "Exists"}],
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"},
    )
    selector = {
        "matchLabels": {
            "app.kubernetes.io/name": "twotower",
            "app.kubernetes.io/instance": "tt",
            "app.kubernetes.io/component": role,
        }
    }
    template = ("spec", "template", "metadata")
    return {
        "replicas": Change(3, of("Deployment", role, "spec", "replicas"), 3),
        "settings": Change({"max_body": "2M"}, variable(role, "TWOTOWER_MAX_BODY"), "2M", {"settings": {"max_body": "1M"}}),
        "extraEnv": Change([{"name": "A", "value": "b"}], variable(role, "A"), "b"),
        "extraEnvFrom": Change([{"secretRef": {"name": "s"}}], one(role, "envFrom"), [{"secretRef": {"name": "s"}}]),
        "image": Change({"repository": "r", "tag": "t", "pullPolicy": "Never"}, one(role, "image"), "r:t"),
        "resources": Change({"limits": {"memory": "7Gi"}}, holds(lambda objects: container(objects, role)["resources"]["limits"], {"memory": "7Gi"}), True),
        "nodeSelector": Change({"a": "b"}, key(role, "nodeSelector"), {"a": "b"}),
        "tolerations": Change(toleration, key(role, "tolerations"), toleration),
        "affinity": Change({"nodeAffinity": {}}, key(role, "affinity"), {"nodeAffinity": {}}),
        "topologySpreadConstraints": Change([constraint], key(role, "topologySpreadConstraints"), [{**constraint, "labelSelector": selector}]),
        "priorityClassName": Change("high", key(role, "priorityClassName"), "high"),
        "runtimeClassName": Change("nvidia", key(role, "runtimeClassName"), "nvidia"),
        "podLabels": Change({"a": "b"}, holds(of("Deployment", role, *template, "labels"), {"a": "b"}), True),
        "podAnnotations": Change({"a": "b"}, of("Deployment", role, *template, "annotations"), {"a": "b"}),
        "extraVolumes": Change([{"name": "v", "emptyDir": {}}], holds(key(role, "volumes"), {"name": "v", "emptyDir": {}}), True),
        "extraVolumeMounts": Change([{"name": "v", "mountPath": "/v"}], holds(one(role, "volumeMounts"), {"name": "v", "mountPath": "/v"}), True),
        "extraContainers": Change([{"name": "side", "image": "i"}], holds(key(role, "containers"), {"name": "side", "image": "i"}), True),
        "extraInitContainers": Change([{"name": "first", "image": "i"}], key(role, "initContainers"), [{"name": "first", "image": "i"}]),
        "strategy.maxSurge": Change("25%", of("Deployment", role, "spec", "strategy", "rollingUpdate", "maxSurge"), "25%"),
        "strategy.maxUnavailable": Change(2, of("Deployment", role, "spec", "strategy", "rollingUpdate", "maxUnavailable"), 2),
        "preStopSeconds": Change(9, lambda objects: container(objects, role)["lifecycle"]["preStop"]["exec"]["command"], ["sleep", "9"]),
        "drainSeconds": Change(500, variable(role, "TWOTOWER_DRAIN"), "500"),
        "startupSeconds": Change(1000, lambda objects: (lambda probe: probe["failureThreshold"] * probe["periodSeconds"])(container(objects, role)["startupProbe"]), 1000),
        "podDisruptionBudget.enabled": Change(False, lambda objects: role in of_kind(objects, "PodDisruptionBudget"), False),
        "podDisruptionBudget.maxUnavailable": Change("50%", of("PodDisruptionBudget", role, "spec", "maxUnavailable"), "50%"),
    }  # fmt: skip


def for_tower(role: str) -> dict[str, Change]:
    """Values that both towers have."""
    with_gpu = {role: {"gpu": {"count": 1}}}
    return {
        "gpu.count": Change(2, lambda objects: container(objects, role)["resources"]["limits"]["nvidia.com/gpu"], 2),
        "gpu.resource": Change("amd.com/gpu", lambda objects: container(objects, role)["resources"]["limits"]["amd.com/gpu"], 1, with_gpu),
        "ports.grpc": Change(7001, lambda objects: container(objects, role)["livenessProbe"]["grpc"]["port"], 7001),
        "ports.metrics": Change(7002, variable(role, "TWOTOWER_METRICS_PORT"), "7002"),
        "autoscaling.minReplicas": Change(2, of("ScaledObject", role, "spec", "minReplicaCount"), 2, KEDA),
        "autoscaling.maxReplicas": Change(20, of("ScaledObject", role, "spec", "maxReplicaCount"), 20, KEDA),
    }  # fmt: skip


EVERY = {
    **CHANGES,
    **{f"{role}.{name}": change for role in ROLES for name, change in for_role(role).items()},
    **{f"{role}.{name}": change for role in ("context", "denoiser") for name, change in for_tower(role).items()},
}


def merged(values: Any, more: Any) -> Any:
    if isinstance(values, dict) and isinstance(more, dict):
        return {
            key: merged(values[key], more[key]) if key in values and key in more else {**values, **more}[key]
            for key in {**values, **more}
        }
    return more


def shown(change: Change, objects: Rendered) -> Any:
    try:
        return change.shows(objects)
    except (KeyError, IndexError, TypeError, StopIteration):
        return None


@pytest.mark.parametrize("name", EVERY)
def test_a_value_shows_where_it_should(name: str) -> None:
    change = EVERY[name]
    values = merged(change.beside, nested(tuple(name.split(".")), change.value))
    assert change.shows(render(values=values)) == change.expected


@pytest.mark.chart
@pytest.mark.parametrize("name", EVERY)
def test_it_is_the_value_that_makes_the_difference(name: str) -> None:
    """Without it, what it changes is something else."""
    change = EVERY[name]
    try:
        objects = render(values=without(change.beside, name))
    except RenderError:  # what it stands beside makes no sense without it
        return
    assert json.dumps(shown(change, objects), default=str) != json.dumps(change.expected, default=str)


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy in which a value is not given."""
    copy: dict[str, Any] = json.loads(json.dumps(values))
    *path, last = name.split(".")
    inner: Any = copy
    for step in path:
        inner = inner.get(step, {})
    inner.pop(last, None)
    return copy


def test_no_value_is_without_a_line() -> None:
    assert {".".join(path) for path in ALL} == set(EVERY)


def test_gpus_make_the_image_and_the_device() -> None:
    objects = render(values={"context": {"gpu": {"count": 1}}})
    assert container(objects, "context")["image"].endswith("-cuda")
    assert variable("context", "TWOTOWER_DEVICE")(objects) == "cuda"
    assert container(objects, "denoiser")["image"].endswith("-cpu")
    assert variable("denoiser", "TWOTOWER_DEVICE")(objects) == "cpu"


@pytest.mark.parametrize(
    ("values", "contexts", "denoisers"),
    [
        ({}, ("1", "1"), ("1", "1")),
        ({"context": {"replicas": 2}, "denoiser": {"replicas": 5}}, ("2", "2"), ("5", "5")),
        (KEDA, ("1", "4"), ("1", "8")),
        ({**KEDA, "denoiser": {"autoscaling": {"minReplicas": 0, "maxReplicas": 3}}}, ("1", "4"), ("0", "3")),
        ({"denoiser": {"enabled": False}}, ("1", "1"), ("0", "1")),
    ],
)
def test_the_decision_has_the_bounds_of_whoever_follows_it(
    values: dict[str, Any], contexts: tuple[str, str], denoisers: tuple[str, str]
) -> None:
    given = environment(container(render(values=values), "gateway"))
    assert (given["TWOTOWER_MIN_CONTEXTS"], given["TWOTOWER_MAX_CONTEXTS"]) == contexts
    assert (given["TWOTOWER_MIN_DENOISERS"], given["TWOTOWER_MAX_DENOISERS"]) == denoisers
    assert given.get("TWOTOWER_AR_FALLBACK") == ("true" if "enabled" in values.get("denoiser", {}) else None)


def test_policies_let_through_what_services_need_and_nothing_else() -> None:
    objects = render()

    def sources(role: str, port: int) -> set[str]:
        found = set()
        for rule in of_kind(objects, "NetworkPolicy")[role]["spec"]["ingress"]:
            if "ports" not in rule or port in {one["port"] for one in rule["ports"]}:
                for peer in rule.get("from", [{"anybody": True}]):
                    labels = peer.get("podSelector", {}).get("matchLabels", {})
                    found.add(
                        labels.get("app.kubernetes.io/component", "cluster" if "namespaceSelector" in peer else "anybody")
                    )
        return found

    assert sources("redis", 6379) == {"gateway", "context", "denoiser"}
    assert sources("context", 50052) == {"gateway", "denoiser"}
    assert sources("context", 9090) == {"denoiser", "cluster"}
    assert sources("denoiser", 50053) == {"context"}
    assert sources("gateway", 50051) == {"anybody"}
    assert of_kind(objects, "NetworkPolicy")["redis"]["spec"]["egress"] == []
