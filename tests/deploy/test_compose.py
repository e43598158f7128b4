"""The compose file's services run as they are written, and every panel of the dashboards has data from them."""

from __future__ import annotations

import json
import math
import shutil
import time
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.compose import FILE, Services, load, services
from tests.support.documents import ROOT
from tests.support.tools import fetched_wheel, prometheus
from twotower.cli.commands import SERVICES
from twotower.settings.sources import check_variables, variables_of

DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
PROMPT = "Tom owns 12 pens. On Friday he buys 6 more. On Saturday he loses 4 of them. How many pens does Tom have?"
LONG = "Mia has 7 apples. On Monday she buys 2 boxes of 5 apples. On Tuesday she gives 4 apples to Tom. " * 4
SERVING = ("gateway", "context", "denoiser")


def test_settings_in_it_are_settings_of_the_services() -> None:
    known = {name for config in SERVICES.values() for name in variables_of(config)}
    for name in SERVING:
        service = load()["services"][name]
        check_variables(service["environment"], known)
        own = set(variables_of(SERVICES[name]))
        assert {key for key in service["environment"] if key.startswith("TWOTOWER_")} <= own, name


def test_services_are_shut_in() -> None:
    for name in (*SERVING, "redis"):
        service = load()["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for name in SERVING:
        service = load()["services"][name]
        drain = int(service["environment"]["TWOTOWER_DRAIN"])
        assert int(service["stop_grace_period"].removesuffix("s")) >= drain + 20
    ports = [port for service in load()["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)  # nothing of it is open to the network unless somebody says so


def test_no_variable_of_a_service_is_taken_from_whoever_starts_it() -> None:
    """As compose does with one that has no value, not even an empty text."""
    for service in load()["services"].values():
        assert all(isinstance(value, str) for value in service.get("environment", {}).values())


@pytest.mark.parametrize(
    ("variables", "checkpoint"), [({}, ""), ({"CHECKPOINT": "nemotron", "MODELS": "/srv/models"}, "/models/nemotron")]
)
def test_the_checkpoint_is_a_folder_of_the_host_where_one_is_named(variables: dict[str, str], checkpoint: str) -> None:
    for name in SERVING:
        service = load(variables)["services"][name]
        assert service["environment"]["TWOTOWER_CHECKPOINT"] == checkpoint
        assert service["volumes"][0] == f"{variables.get('MODELS', 'models')}:/models:ro"


@pytest.mark.chart
def test_it_has_the_form_of_a_compose_file(tmp_path: Path) -> None:
    """As the schema that compose 1.29 came with has it, which is older than two keys."""
    with zipfile.ZipFile(fetched_wheel("docker-compose==1.29.2")) as wheel:
        schema = json.loads(wheel.read("compose/config/compose_spec.json"))
    jsonschema = pytest.importorskip("jsonschema")
    checker = jsonschema.Draft7Validator({**schema, "$schema": "http://json-schema.org/draft-07/schema#"})
    config = load()
    assert config.pop("name") == "twotower"
    checker.validate(config)
    config["services"]["gateway"]["comand"] = []
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        checker.validate(config)


def test_the_file_for_hosts_without_a_gpu_changes_the_towers_alone() -> None:
    class Reset(yaml.SafeLoader):
        pass

    Reset.add_constructor("!reset", lambda loader, node: None)
    config = yaml.load((FILE.parent / "cpu.yaml").read_text(), Reset)
    assert set(config["services"]) == set(SERVING)
    assert all(config["services"][name]["deploy"] is None for name in ("context", "denoiser"))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """Redis, gateway, context, denoiser and Prometheus, ready, and scraped under some load."""
    scratch = tmp_path_factory.mktemp("compose")
    with services(scratch) as running:
        running.start("redis", "--bind", running.addresses["redis"])
        small = {
            "TWOTOWER_KERNELS": "torch",
            "TWOTOWER_STATE_MEMORY": "256M",
            "TWOTOWER_PREFIX_MEMORY": "1M",
            "TWOTOWER_PREFILL_CHUNK": "16",
        }
        for name in SERVING:
            environment = running.config["services"][name]["environment"]
            environment.update(small if name == "context" else {"TWOTOWER_KERNELS": "torch"} if name == "denoiser" else {})
            running.start(name)
        start_prometheus(running)
        for name in SERVING:
            wait_for(lambda name=name: running.healthy(name))  # type: ignore[misc]
        wait_for(lambda: status(f"http://{running.addresses['gateway']}:8000/readyz") == 200)
        yield running


def start_prometheus(running: Services) -> None:
    """With the configuration for the compose file, but addresses of here and a shorter interval."""
    place = running.scratch / "config"
    shutil.copytree(ROOT / "deploy" / "prometheus", place)
    text = running.here((place / "prometheus.yml").read_text(), "prometheus")
    (place / "prometheus.yml").write_text(text.replace("_interval: 15s", "_interval: 500ms"))
    words = [running.here(word, "prometheus") for word in running.config["services"]["prometheus"]["command"]]
    words = [word.replace(str(ROOT / "deploy" / "prometheus"), str(place)) for word in words]
    listen = f"--web.listen-address={running.addresses['prometheus']}:9090"
    running.spawn("prometheus", [str(prometheus() / "prometheus"), *words, listen], {"PATH": "/usr/bin:/bin"})


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return int(reply.status)
    except OSError:
        return 0


def wait_for(condition: Any, within_s: float = 300) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def complete(running: Services, prompt: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"http://{running.addresses['gateway']}:8000/v1/completions",
        json.dumps({"prompt": prompt, "max_tokens": 64, **body}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def query(running: Services, expr: str) -> list[float]:
    """Values of an instant query."""
    asked = urllib.parse.urlencode({"query": expr})
    with urllib.request.urlopen(f"http://{running.addresses['prometheus']}:9090/api/v1/query?{asked}", timeout=10) as reply:
        return [float(one["value"][1]) for one in json.load(reply)["data"]["result"]]


def panels() -> list[tuple[str, str]]:
    """(panel, query) of all dashboards."""
    found = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            found += [(f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"]]
    return found


def load_it(running: Services) -> None:
    """Requests of both modes, with prompts that begin alike and more of them than the prefix cache holds."""
    for number in range(6):
        for _ in range(2):
            complete(running, f"{number} pens. {LONG} {PROMPT}", mode="ar" if number == 5 else "diffusion", max_tokens=16)


@pytest.mark.chart
def test_a_request_is_answered(stack: Services) -> None:
    assert complete(stack, PROMPT)["choices"][0]["text"].endswith("14.")


@pytest.mark.chart
def test_no_panel_is_without_data(stack: Services) -> None:
    empty: dict[str, str] = {}
    for _ in range(8):
        load_it(stack)
        empty = {}
        for title, expr in panels():
            shown = query(stack, expr.replace("$__rate_interval", "30s").replace("$namespace", ".*"))
            if not any(math.isfinite(value) for value in shown):
                empty[title] = expr
        if not empty:
            break
        time.sleep(0.5)
    assert not empty
    assert len(panels()) > 15


@pytest.mark.chart
def test_prometheus_scrapes_all_targets_and_evaluates_all_alerts(stack: Services) -> None:
    wait_for(lambda: query(stack, "min(up)") == [1.0])
    assert query(stack, "count(up)") == [3.0]
    with urllib.request.urlopen(f"http://{stack.addresses['prometheus']}:9090/api/v1/rules", timeout=10) as reply:
        (group,) = json.load(reply)["data"]["groups"]
    assert len(group["rules"]) == 11
    assert all(rule["health"] == "ok" for rule in group["rules"] if rule["health"] != "unknown")


@pytest.mark.chart
def test_services_stop_in_order(stack: Services) -> None:
    """The last test of this file."""
    for name in ("gateway", "denoiser", "context"):
        assert stack.stop(name) == 0, stack.log(name)
