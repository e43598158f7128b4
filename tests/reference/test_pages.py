"""The reference pages are those that the code gives, and hold everything they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from twotower.gateway.metrics import Metrics
from twotower.prefix.metrics import PrefixMetrics
from twotower.prefix.stats import PrefixStats
from twotower.reference.metrics import metric_entries
from twotower.reference.pages import PAGES
from twotower.status import STATUS

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_fresh(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), f"docs/{name} is stale: run `make docs` and commit"


def test_pages_are_written(tmp_path: Path) -> None:
    def write() -> str:
        argv = [sys.executable, "-m", "twotower.reference", str(tmp_path)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout

    assert write().count("wrote ") == len(PAGES)
    assert write() == ""
    for name in PAGES:
        assert (tmp_path / name).read_bytes() == (DOCS / name).read_bytes()


def test_every_error_has_a_row_with_a_meaning() -> None:
    rows = {
        line.split("|")[1].strip(): line for line in (DOCS / "errors.md").read_text().splitlines() if line.startswith("| `")
    }
    assert rows.keys() == {f"`{cls.__name__}`" for cls in STATUS}
    for row in rows.values():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 7
        assert cells[6].endswith(".")


def test_what_a_service_exposes_is_in_the_reference() -> None:
    """Read from the source, against the metrics themselves."""
    registry = CollectorRegistry()
    Metrics(registry)
    PrefixMetrics(PrefixStats.of("memory"), registry)
    exposed = {(f.name + ("_total" if f.type == "counter" else ""), f.type, f.documentation) for f in registry.collect()}
    assert exposed <= {(entry.name, entry.kind, entry.help) for entry in metric_entries()}
    assert len(exposed) > 10
    prefixes = {entry.name: entry.labels for entry in metric_entries()}
    assert prefixes["twotower_prefix_lookups_total"] == ("tier", "result")
    assert prefixes["twotower_gateway_requests_total"] == ("mode", "outcome")


def test_a_metric_whose_name_is_computed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("from prometheus_client import Counter\nCounter('a' + x, 'help')\n")
    with pytest.raises(ValueError, match=r"bad\.py:2: "):
        list(metric_entries(tmp_path))
