"""Alerts, dashboards and the collector's settings: valid, about metrics that exist, and each alert with what to do."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.charts import CHART
from tests.support.documents import ROOT, anchors
from tests.support.tools import prometheus

RULES = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))
GUIDE = ROOT / "docs" / "operations.md"
METRICS = ROOT / "docs" / "metrics.md"

SUFFIXES = ("", "_bucket", "_sum", "_count")


def known() -> set[str]:
    """All series that services offer."""
    names = re.findall(r"^\| `(twotower_\w+)` \| (\w+)", METRICS.read_text(), flags=re.MULTILINE)
    return {name + suffix for name, kind in names for suffix in (SUFFIXES if kind == "histogram" else ("",))}


def alerts() -> list[Any]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    return list(group["rules"])


def promtool(*words: str, cwd: Path = RULES.parent) -> str:
    done = subprocess.run([str(prometheus() / "promtool"), *words], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.chart
def test_promtool_finds_nothing_wrong() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", RULES.name)
    promtool("check", "config", "prometheus.yml")


@pytest.mark.chart
def test_alerts_fire_on_what_they_are_for_and_on_nothing_healthy() -> None:
    promtool("test", "rules", "alerts_test.yaml")


def test_every_alert_is_tried() -> None:
    tried = set()
    for test in yaml.safe_load((RULES.parent / "alerts_test.yaml").read_text())["tests"]:
        tried |= {case["alertname"] for case in test.get("alert_rule_test", ()) if case["exp_alerts"]}
    assert tried == {alert["alert"] for alert in alerts()}


def test_every_alert_has_its_place_in_the_guide() -> None:
    for alert in alerts():
        page, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert ROOT / page == GUIDE
        assert anchor == alert["alert"].lower()
        assert anchor in anchors(GUIDE)
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_the_chart_has_the_same_alerts() -> None:
    assert RULES.read_text() == (CHART / "files" / "alerts.yaml").read_text()


def test_alerts_and_dashboards_ask_for_metrics_that_exist() -> None:
    texts = [alert["expr"] for alert in alerts()]
    for path in DASHBOARDS:
        texts += [target["expr"] for panel in json.loads(path.read_text())["panels"] for target in panel["targets"]]
    named = {name for text in texts for name in re.findall(r"\btwotower_\w+", text)}
    assert len(named) > 20
    assert named <= known()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_one_that_grafana_takes(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"]
    assert board["title"].startswith("twotower")
    places: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        assert panel["description"], panel["title"]
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & places, f"{panel['title']} lies on another panel"
        assert max(x for x, _ in cells) < 24
        places |= cells
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_every_dashboard_is_in_the_guide() -> None:
    for path in DASHBOARDS:
        assert json.loads(path.read_text())["title"].removeprefix("twotower: ") in GUIDE.read_text().lower()


def test_the_collector_s_pipelines_are_made_of_what_it_defines() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "otel" / "collector.yaml").read_text())
    service = config["service"]
    assert set(service["extensions"]) == set(config["extensions"])
    for part in ("receivers", "processors", "exporters"):
        used = {name for pipeline in service["pipelines"].values() for name in pipeline[part]}
        assert used == set(config[part])
    for pipeline in service["pipelines"].values():
        assert pipeline["processors"][0] == "memory_limiter"


@pytest.mark.chart
def test_the_collector_scrapes_what_prometheus_scrapes(tmp_path: Path) -> None:
    scrapes = yaml.safe_load((ROOT / "deploy" / "otel" / "collector.yaml").read_text())["receivers"]["prometheus"]["config"]
    own = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())["scrape_configs"]

    def targets(jobs: Any) -> dict[str, Any]:
        return {job["job_name"]: job["static_configs"] for job in jobs}

    assert targets(scrapes["scrape_configs"]) == targets(own)
    (tmp_path / "scrape.yml").write_text(yaml.safe_dump(scrapes))
    promtool("check", "config", "--syntax-only", "scrape.yml", cwd=tmp_path)
