"""The recorded ratios: measured on a tiny checkpoint, kept, read again, and drawn."""

from __future__ import annotations

import dataclasses
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.bench.history import SHOWN, picture, read_records, table, write_history
from twotower.bench.machine import Machine, this_commit
from twotower.bench.record import Ratios, Record, write_record
from twotower.bench.sizes import delta_bytes
from twotower.cli.main import main
from twotower.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"

SLOW, FAST = Machine("a <slow> CPU", 2, None, "3.11.2", "2.13.0"), Machine("a CPU", 16, "a GPU", "3.12.0", "2.13.0")


def record(day: int, machine: Machine = SLOW, **ratios: float) -> Record:
    values = {"engine_over_plain": 9.5, "services_over_engine": 0.9, "batch_gain": 2.5, "bytes_a_block": 4_800_000}
    kept = Ratios(**{**values, "speedup": 4.7, "retention": 0.99, **ratios})  # type: ignore[arg-type]
    return Record(datetime(2026, 11, 1, 9, 30, tzinfo=UTC) + timedelta(days=day), f"abc{day}", machine, {"batch": 16}, kept)


def test_a_run_is_kept_with_its_date_machine_and_commit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = write_tiny_checkpoint(tmp_path / "tiny"), tmp_path / "out"
    words = "bench record --batch 2 --rounds 1 --repeats 2 --max-tokens 20 --problems 3 --threads 1 --json"
    before = datetime.now(UTC).replace(microsecond=0)
    assert main([*words.split(), "--out", str(out), "--checkpoint", str(checkpoint)]) == 0
    printed = json.loads(capfd.readouterr().out)
    (file,) = out.glob("*.json")
    assert json.loads(file.read_text()) == printed
    (kept,) = read_records(out)
    assert kept.as_json() == printed
    assert before <= kept.date <= datetime.now(UTC)
    assert kept.commit == this_commit()
    assert kept.machine.cores >= 1
    assert kept.settings | {"batch": 2, "repeats": 2, "problems": 3} == kept.settings
    ratios = dataclasses.asdict(kept.ratios)
    assert ratios.pop("bytes_a_block") == delta_bytes()
    assert min(ratios.values()) > 0
    assert kept.ratios.retention == 1.0  # the shipped checkpoint solves these three in both modes
    assert (out / "history.svg").exists()
    assert f"| {kept.date:%Y-%m-%d %H:%M} |" in (out / "README.md").read_text()


def test_records_are_read_in_the_order_of_their_dates(tmp_path: Path) -> None:
    records = [record(day) for day in (3, 1, 2)]
    for each in records:
        assert write_record(each, tmp_path / "out").name == each.file_name
    assert read_records(tmp_path / "out") == sorted(records, key=lambda each: each.date)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "Expecting"),
        ("[]", "no JSON object"),
        ('{"schema": 2}', "schema: must be 1, not 2"),
        ('{"schema": 1}', "'date'"),
        (json.dumps({**record(1).as_json(), "ratios": {"speedup": 1}}), "retention"),
    ],
)
def test_a_file_that_is_no_record_is_named_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "x.json"))) as raised:
        read_records(tmp_path)
    assert named in str(raised.value)
    assert main(["bench", "record", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {raised.value}\n"


@pytest.mark.parametrize("words", ["--batch 1", "--rounds 0", "--repeats 0", "--problems 0", "--max-tokens 0"])
def test_bad_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    option = words.split()[0].removeprefix("--").replace("-", "_")
    assert main(["bench", "record", "--out", str(tmp_path), *words.split()]) == 1
    assert capsys.readouterr().err.startswith(f"error: {option}: must be at least ")


def test_a_picture_has_a_panel_for_each_ratio_and_a_line_for_each_machine() -> None:
    records = [record(1, speedup=4.0), record(5, FAST, speedup=6.0), record(9, speedup=5.0)]
    root = ElementTree.fromstring(picture(records))
    panels = root.findall(f"{SVG}g")
    assert [panel.findtext(f"{SVG}text") for panel in panels] == [shown.title for shown in SHOWN]
    speedup = panels[[shown.name for shown in SHOWN].index("speedup")]
    slow, fast = speedup.findall(f"{SVG}polyline")
    assert (len(slow.attrib["points"].split()), len(fast.attrib["points"].split())) == (2, 1)
    (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in slow.attrib["points"].split())
    assert x1 < x2
    assert y1 > y2  # 5.0 lies above 4.0
    labels = [text.text for text in root.findall(f"{SVG}text")]
    assert labels == ["a <slow> CPU, 2 cores", "a GPU, 16 cores"]


@pytest.mark.parametrize("records", [[], [record(1)], [record(1), record(2)]])
def test_few_records_and_equal_ones_can_be_drawn(records: list[Record]) -> None:
    root = ElementTree.fromstring(picture(records))
    assert len(root.findall(f".//{SVG}circle[@r='3.5']")) == len(SHOWN) * len(records)
    assert "nan" not in picture(records)


def test_a_table_has_the_newest_first() -> None:
    rows = table([record(1), record(2, retention=0.987)]).splitlines()[2:]
    assert [row.split("|")[2].strip() for row in rows] == ["abc2", "abc1"]
    assert "| 9.50x | 0.900 | 2.50x | 4,800,000 | 4.70x | 98.7% |" in rows[0]


def test_the_committed_page_is_that_of_the_committed_records(tmp_path: Path) -> None:
    committed = ROOT / "docs" / "benchmarks"
    for file in committed.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_history(tmp_path)
    for name in ("README.md", "history.svg"):
        assert (tmp_path / name).read_text() == (committed / name).read_text(), f"docs/benchmarks/{name}: run `make bench`"


def test_a_page_can_be_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_record(record(1), tmp_path)
    assert main(["bench", "record", "--out", str(tmp_path), "--plot-only"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'README.md'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "README.md", "history.svg"]
