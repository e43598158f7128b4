"""Every value is described, known to the schema, and refused when it is none."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.support.charts import CHART, PROFILES, ROLES, RenderError, container, environment, render
from tests.support.documents import ROOT
from twotower.cli.commands import SERVICES
from twotower.settings.declare import settings_of

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
COMMON = {"drain", "checkpoint", "revision", "redis", "host"}
TOWER = COMMON | {"port", "metrics_port", "device"}
BOUNDS = {"min_denoisers", "max_denoisers", "min_contexts", "max_contexts"}
DECIDED = {
    "gateway": COMMON | BOUNDS | {"grpc_port", "http_port", "model_name"},
    "context": TOWER | {"advertise"},
    "denoiser": TOWER,
}
"""Settings that follow from values of their own."""
SETTINGS = {role: {setting.name for setting in settings_of(SERVICES[role]).values()} for role in ROLES}


def resolved(schema: Any) -> Any:
    while "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
    return schema


def paths(values: Any, schema: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of all values: as deep as the schema names keys."""
    properties = resolved(schema).get("properties")
    if properties is None or not path_is_ours(path):
        yield path
        return
    for key in properties:
        yield from paths(values[key] if values else None, properties[key], (*path, key))


def path_is_ours(path: tuple[str, ...]) -> bool:
    """Not one whose inside is Kubernetes' matter, or free."""
    return not path or (path[-1] not in ("resources", "global") and not (path[-1] == "image" and path[0] in ROLES))


OWN = {name: schema for name, schema in SCHEMA["properties"].items() if name != "global"}
ALL = list(paths(VALUES, {**SCHEMA, "properties": OWN}))


def nested(path: tuple[str, ...], value: Any) -> Any:
    for key in reversed(path):
        value = {key: value}
    return value


def at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def test_the_schema_and_the_defaults_have_the_same_keys() -> None:
    def keys(values: Any, schema: Any, path: tuple[str, ...]) -> Iterator[str]:
        properties = resolved(schema).get("properties")
        if properties is None or not path_is_ours(path):
            return
        for key in set(properties) ^ set(values):
            yield ".".join((*path, key))
        for key in set(properties) & set(values):
            yield from keys(values[key], properties[key], (*path, key))

    assert list(keys(VALUES, SCHEMA, ())) == ["global"]
    assert len(ALL) > 100


def test_every_value_is_described_and_the_table_is_fresh() -> None:
    spec = importlib.util.spec_from_file_location("values_table", ROOT / "helm" / "values_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    text = (CHART / "values.yaml").read_text()
    described = {value.path for value in module.documented(text)}
    assert described == set(ALL)
    readme = (CHART / "README.md").read_text()
    assert module.page(readme, text) == readme, "run make docs"


def objects(schema: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    properties = resolved(schema).get("properties")
    if properties:
        yield path
        for key, inner in properties.items():
            yield from objects(inner, (*path, key))


@pytest.mark.parametrize("path", [path for path in objects(SCHEMA) if path_is_ours(path)], ids=".".join)
def test_no_object_takes_a_key_that_it_does_not_know(path: tuple[str, ...]) -> None:
    assert resolved_at(path)["additionalProperties"] is False


def resolved_at(path: tuple[str, ...]) -> Any:
    schema = SCHEMA
    for key in path:
        schema = resolved(schema)["properties"][key]
    return resolved(schema)


@pytest.mark.parametrize("major", [pytest.param(3, marks=pytest.mark.chart), 4])
@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"denoisers": {"replicas": 2}}, "denoisers"),
        ({"denoiser": {"replica": 2}}, "replica"),
        ({"context": {"gpu": {"counts": 1}}}, "counts"),
        ({"context": {"ports": {"grpc": 70000}}}, "grpc"),
        ({"denoiser": {"replicas": "two"}}, "replicas"),
        ({"redis": {"mode": "embedded"}}, "mode"),
        ({"redis": {"external": {"url": "redis://:hunter2@host:6379"}}}, "url"),  # a password belongs into a secret
        ({"checkpoint": {"source": "hub"}}, "source"),
        ({"settings": {"TWOTOWER_SLOTS": 8}}, "SLOTS"),
        ({"gateway": {"settings": {"max-in-flight": 8}}}, "max-in-flight"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"gateway": {"autoscaling": {"maxReplicas": 2}}}, "autoscaling"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], named: str, major: int) -> None:
    with pytest.raises(RenderError, match=named):
        render(values=values, major=major)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"checkpoint": {"source": "pvc"}}, "checkpoint.pvc.claimName"),
        ({"checkpoint": {"source": "image"}}, "checkpoint.image.reference"),
        ({"checkpoint": {"source": "fetch", "fetch": {"command": ["true"]}}}, "checkpoint.revision"),
        ({"checkpoint": {"source": "fetch", "revision": "a"}}, "checkpoint.fetch.command"),
        ({"redis": {"mode": "external"}}, "redis.external"),
        ({"ingress": {"enabled": True}}, "ingress.hosts"),
        ({"gatewayApi": {"enabled": True}}, "gatewayApi.parentRefs"),
        ({"autoscaling": {"kind": "keda", "trigger": "prometheus"}}, "autoscaling.prometheus.serverAddress"),
        ({"autoscaling": {"kind": "hpa"}, "denoiser": {"autoscaling": {"minReplicas": 0}}}, "cannot scale to zero"),
        ({"autoscaling": {"kind": "keda"}, "context": {"autoscaling": {"minReplicas": 9}}}, "minReplicas"),
        ({"context": {"strategy": {"maxSurge": 0, "maxUnavailable": 0}}}, "no pod could ever be replaced"),
        ({"context": {"settings": {"port": 1}}}, "context.ports.grpc"),
        ({"settings": {"redis_url": "redis://elsewhere"}}, "use redis"),
    ],
    ids=str,
)
def test_what_is_missing_or_makes_no_sense_is_refused_with_what_to_do(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RenderError, match=re.escape(said)):
        render(values=values)


@pytest.mark.parametrize("role", ROLES)
def test_every_setting_of_a_service_can_be_given_without_a_change_of_the_chart(role: str) -> None:
    """All but those that the chart decides, which it refuses by name."""
    decided = 0
    for name in SETTINGS[role]:
        values = {role: {"settings": {name: "1"}}}
        if name in DECIDED[role]:
            decided += 1
            with pytest.raises(RenderError, match=rf"settings\.{name}: the chart decides this one"):
                render(values=values)
        else:
            assert environment(container(render(values=values), role))[f"TWOTOWER_{name.upper()}"] == "1"
    assert decided == len(DECIDED[role])


@pytest.mark.parametrize("file", [CHART / "values.yaml", *PROFILES], ids=lambda file: file.stem)
def test_settings_in_profiles_are_settings_of_their_services(file: Any) -> None:
    values = yaml.safe_load(file.read_text())
    everywhere = set().union(*SETTINGS.values())
    assert set(values.get("settings", ())) <= everywhere
    for role in ROLES:
        assert set(values.get(role, {}).get("settings", ())) <= SETTINGS[role], role
