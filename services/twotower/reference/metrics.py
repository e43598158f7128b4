"""The reference of metrics, read from the source: every call that makes a metric, wherever it stands."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent

KINDS = {
    "Counter": "counter",
    "CounterMetricFamily": "counter",
    "Gauge": "gauge",
    "GaugeMetricFamily": "gauge",
    "Histogram": "histogram",
    "HistogramMetricFamily": "histogram",
    "Summary": "summary",
    "SummaryMetricFamily": "summary",
    "Info": "info",
    "InfoMetricFamily": "info",
}
"""What makes a metric in `prometheus_client`, and what it makes."""

_HEAD = """# Metrics

Generated from the source by `make docs`; do not edit.

Services offer their metrics in Prometheus' text format: a gateway at `/metrics` of its HTTP port, a context and a denoiser at
`/metrics` of the port that `--metrics-port` names. Counters count since the start of their process. A histogram has the series
`_bucket`, `_sum` and `_count`.
"""


@dataclass(frozen=True, slots=True)
class MetricEntry:
    """One metric, as its source declares it."""

    name: str
    """As it is exposed: a counter's ends in ``_total``."""
    kind: str
    help: str
    labels: tuple[str, ...]
    module: str
    """Path of the source, relative to the package."""


def metrics_page(package: Path = PACKAGE) -> str:
    """The page, as Markdown."""
    by_module: dict[str, list[MetricEntry]] = defaultdict(list)
    for entry in metric_entries(package):
        by_module[entry.module].append(entry)
    parts = [_HEAD]
    for module, entries in sorted(by_module.items()):
        about = ast.get_docstring(ast.parse((package / module).read_text(encoding="utf-8"))) or ""
        parts.append(f"\n## {module.split('/')[0].capitalize()}\n\n{about.splitlines()[0]} (`services/twotower/{module}`)\n\n")
        parts.append("| Metric | Kind | Labels | Meaning |\n|---|---|---|---|\n")
        for e in entries:
            labels = ", ".join(f"`{label}`" for label in e.labels)
            parts.append(f"| `{e.name}` | {e.kind} | {labels} | {e.help} |\n")
    return "".join(parts)


def metric_entries(package: Path = PACKAGE) -> Iterator[MetricEntry]:
    """All metrics that the package's source declares. Raises ValueError for one whose name or help is not written out."""
    for path in sorted(package.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if "prometheus_client" not in source:
            continue
        module = path.relative_to(package).as_posix()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                yield _entry(node, KINDS[node.func.id], module)


def _entry(call: ast.Call, kind: str, module: str) -> MetricEntry:
    given = dict(zip(("name", "documentation", "labelnames"), call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    labels = given.get("labelnames", given.get("labels"))
    try:
        name, meaning = (ast.literal_eval(given[key]) for key in ("name", "documentation"))
        names = () if labels is None else tuple(ast.literal_eval(labels))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{module}:{call.lineno}: a metric's name, help and labels must be written out") from error
    suffix = "_total" if kind == "counter" and not name.endswith("_total") else ""
    return MetricEntry(f"{name}{suffix}", kind, meaning, names, module)
