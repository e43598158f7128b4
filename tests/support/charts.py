"""The chart as Helm renders it: objects, and what is asked of them."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.support.documents import ROOT
from tests.support.tools import helm

CHART = ROOT / "helm" / "twotower"
PROFILES = tuple(sorted((CHART / "ci").glob("*-values.yaml")))
RELEASE, NAMESPACE = "tt", "serving"
FULLNAME = "tt-twotower"
TOWERS = ("context", "denoiser")
ROLES = ("gateway", *TOWERS)

Object = dict[str, Any]


class RenderError(Exception):
    """What Helm said."""


def profile(name: str) -> Path:
    """`ci/NAME-values.yaml`."""
    return CHART / "ci" / f"{name}-values.yaml"


def render(*files: Path, values: Mapping[str, Any] | None = None, major: int = 4, options: Sequence[str] = ()) -> list[Object]:
    """All objects, hooks included. `values` count before those of `files`. Raises RenderError."""
    return list(_render(files, json.dumps(values or {}, sort_keys=True), major, tuple(options)))


@cache
def _render(files: tuple[Path, ...], values: str, major: int, options: tuple[str, ...]) -> tuple[Object, ...]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as given:
        given.write(values)
        given.flush()
        chosen = [word for file in (*files, given.name) for word in ("--values", str(file))]
        words = [str(helm(major)), "template", RELEASE, str(CHART), "--namespace", NAMESPACE, *chosen, *options]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RenderError(done.stderr)
    return tuple(found for found in yaml.load_all(done.stdout, Strict) if found is not None)


class Strict(yaml.SafeLoader):
    """YAML in which no key stands twice: Kubernetes takes the last one, and nobody notices."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Of one mapping."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        doubled = {key for key in keys if keys.count(key) > 1}
        assert not doubled, f"twice: {doubled} {node.start_mark}"
        return super().construct_mapping(node, deep)


def of_kind(objects: Sequence[Object], kind: str) -> dict[str, Object]:
    """Objects of a kind, by name without the release's."""
    return {found["metadata"]["name"].removeprefix(f"{FULLNAME}-"): found for found in objects if found["kind"] == kind}


def deployment(objects: Sequence[Object], name: str) -> Object:
    """A Deployment of a role, or of Redis."""
    return of_kind(objects, "Deployment")[name]


def pod(found: Object) -> Object:
    """The pod's spec of an object that has one."""
    spec: Object = found["spec"] if found["kind"] == "Pod" else found["spec"]["template"]["spec"]
    return spec


def container(objects: Sequence[Object], role: str) -> Object:
    """The service's own container."""
    first: Object = pod(deployment(objects, role))["containers"][0]
    assert first["name"] == role
    return first


def pods(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """(name, pod's spec) of everything that runs."""
    for found in objects:
        if found["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job", "Pod"):
            yield found["metadata"]["name"], pod(found)


def environment(of: Object) -> dict[str, Any]:
    """A container's variables: values, or where they come from."""
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in of["env"]}
