"""Each profile renders strictly, and what it renders is what Kubernetes and the operators of custom resources accept."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.charts import CHART, PROFILES, Object, pods, profile, render
from tests.support.documents import ROOT
from tests.support.tools import custom_resources, helm

pytest_profiles = pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem.removesuffix("-values"))
KUBERNETES = ("1.33", "1.37")
"""The oldest that has all that the chart can use, and a recent one."""

CUSTOM = {
    "ScaledObject": ("@kubernetes-models/keda/keda.sh/v1alpha1", "keda.sh/v1alpha1"),
    "ServiceMonitor": ("@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1", "monitoring.coreos.com/v1"),
    "PodMonitor": ("@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1", "monitoring.coreos.com/v1"),
    "PrometheusRule": ("@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1", "monitoring.coreos.com/v1"),
    "HTTPRoute": ("@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1", "gateway.networking.k8s.io/v1"),
    "GRPCRoute": ("@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1", "gateway.networking.k8s.io/v1"),
}
"""Where the types of custom resources are, and the version in which the chart writes them."""

EVERYTHING: dict[str, Any] = {
    "autoscaling": {
        "kind": "keda",
        "trigger": "prometheus",
        "prometheus": {"serverAddress": "http://p:9090", "authenticationRef": "a"},
    }
}
"""On top of the profile for production: the branch that it does not take."""


def test_there_is_a_profile_for_each_way_to_run() -> None:
    names = {file.stem.removesuffix("-values") for file in PROFILES}
    assert names == {"cpu-tryout", "two-gpus", "production", "ar-one-gpu", "air-gapped", "restricted"}


@pytest.mark.parametrize("major", [pytest.param(3, marks=pytest.mark.chart), 4])
@pytest_profiles
def test_a_profile_is_linted_and_rendered_strictly(file: Path, major: int) -> None:
    words = [str(helm(major)), "lint", "--strict", str(CHART), "--values", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    objects = render(file, major=major)
    assert len(objects) > 10
    names = [(found["kind"], found["metadata"]["name"]) for found in objects]
    assert len(names) == len(set(names))


@pytest.mark.chart
@pytest_profiles
def test_both_helms_render_the_same(file: Path) -> None:
    def by_name(objects: list[Object]) -> list[str]:
        return sorted(json.dumps(found, sort_keys=True) for found in objects)

    assert by_name(render(file, major=3)) == by_name(render(file, major=4))


@pytest.mark.chart
@pytest.mark.parametrize("version", KUBERNETES)
@pytest_profiles
def test_kubernetes_accepts_the_objects(file: Path, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    checked = 0
    for found in render(file):
        if found["kind"] not in CUSTOM:
            validate(found, version, strict=True)
            checked += 1
    assert checked > 10


@pytest.mark.chart
def test_what_kubernetes_does_not_know_is_noticed() -> None:
    checking = pytest.importorskip("kubernetes_validate")
    found = json.loads(json.dumps(next(one for one in render() if one["kind"] == "Deployment")))
    found["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(checking.ValidationError):
        checking.validate(found, KUBERNETES[0], strict=True)


def checked_as_types(objects: list[Object], scratch: Path) -> str:
    """What the TypeScript compiler says of custom resources as literals of their types; empty: nothing.

    A literal with a key that its type lacks is an error, which no schema of a custom resource makes it: such a key is dropped.
    """
    lines = []
    for number, found in enumerate(objects):
        module, version = CUSTOM[found["kind"]]
        assert found["apiVersion"] == version
        lines.append(f'import type {{ I{found["kind"]} as T{number} }} from "{module}";')
        lines.append(f"export const o{number}: T{number} = {json.dumps(found)};")
    (scratch / "objects.ts").write_text("\n".join(lines))
    (scratch / "node_modules").symlink_to(custom_resources() / "node_modules")
    compiler = custom_resources() / "node_modules" / ".bin" / "tsc"
    options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--moduleResolution", "nodenext"]
    words = [str(compiler), *options, "objects.ts"]
    done = subprocess.run(words, cwd=scratch, capture_output=True, text=True, check=False)
    assert bool(done.returncode) == bool(done.stdout)
    return done.stdout


def checked_by_schemas(objects: list[Object], scratch: Path) -> str:
    """What the schemas of custom resources say of them; empty: nothing."""
    lines: list[str] = []
    for found in objects:
        module, _ = CUSTOM[found["kind"]]
        lines.append(f'import {{ {found["kind"]} }} from "{module}";') if found["kind"] not in "".join(lines) else None
        lines.append(f"try {{ new {found['kind']}({json.dumps(found)}).validate(); }} catch (e) {{ console.log(e.message); }}")
    (scratch / "objects.mjs").write_text("\n".join(sorted(lines, key=lambda line: not line.startswith("import"))))
    if not (scratch / "node_modules").exists():
        (scratch / "node_modules").symlink_to(custom_resources() / "node_modules")
    done = subprocess.run(["node", "objects.mjs"], cwd=scratch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.chart
def test_operators_accept_the_custom_resources(tmp_path: Path) -> None:
    rendered = [*render(profile("production")), *render(profile("production"), values=EVERYTHING)]
    objects = [found for found in rendered if found["kind"] in CUSTOM]
    assert {found["kind"] for found in objects} == set(CUSTOM)
    assert checked_as_types(objects, tmp_path) == ""
    assert checked_by_schemas(objects, tmp_path) == ""


@pytest.mark.chart
def test_what_operators_do_not_know_is_noticed(tmp_path: Path) -> None:
    found = json.loads(json.dumps(next(one for one in render(profile("production")) if one["kind"] == "ScaledObject")))
    found["spec"]["maxReplicas"] = 3
    assert "maxReplicas" in checked_as_types([found], tmp_path)
    del found["spec"]["maxReplicas"], found["spec"]["triggers"]
    assert "triggers" in checked_by_schemas([found], tmp_path)


@pytest_profiles
def test_pods_satisfy_the_restricted_standard(file: Path) -> None:
    """Less the one that fills a node's disk, which is root there and nowhere else."""
    for name, spec in pods(render(file)):
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        fetches = any("hostPath" in volume for volume in spec.get("volumes", ()))
        assert not fetches or file == profile("two-gpus"), name
        for one in (*spec.get("initContainers", ()), *spec["containers"]):
            security = one["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security.get("runAsUser") != 0 or (fetches and one["name"] == "checkpoint")
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False


@pytest_profiles
def test_every_container_says_what_it_needs(file: Path) -> None:
    """A quota refuses others."""
    for name, spec in pods(render(file)):
        for one in spec["containers"]:
            assert one["resources"]["requests"].keys() >= {"cpu", "memory"}, name
            assert "memory" in one["resources"]["limits"], name


def test_the_commands_of_the_page_render() -> None:
    text = (ROOT / "helm" / "twotower" / "README.md").read_text(encoding="utf-8")
    for file in PROFILES:
        assert f"`ci/{file.name}`" in text
