"""The files for contributors do what they say: hooks, workflow, templates, the contract's checks, and no pickle anywhere."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.documents import ROOT

BUF = Path(sys.executable).parent / "buf"
RELEASED = ROOT / "proto" / "released.binpb"


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_hooks_are_what_lint_runs() -> None:
    words = ["make", "--no-print-directory", "-n", "-o", "setup", "-o", "proto-check", "lint"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (repo,) = load(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"] for hook in repo["hooks"]]
    assert set(entries) == {*shown, "make proto-check"}
    assert len(shown) == 5
    assert re.search(r"^lint: .*\bproto-check\b", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_configuration_of_hooks_is_valid() -> None:
    argv = [sys.executable, "-m", "pre_commit", "validate-config", ".pre-commit-config.yaml"]
    assert subprocess.run(argv, cwd=ROOT, check=False).returncode == 0


def test_the_workflow_runs_what_ci_runs_on_every_supported_python() -> None:
    job = load(".github/workflows/ci.yml")["jobs"]["check"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=" + job["strategy"]["matrix"]["python"][0]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in script if line.startswith("make ")] == ["make lint", "make test"]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_a_form_has_what_a_form_needs(name: str) -> None:
    form = load(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    for part in form["body"]:
        assert part["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown")
        assert part["attributes"].get("label") or part["type"] == "markdown"
    assert len({part["id"] for part in form["body"]}) == len(form["body"])


def breaks(proto: Path) -> str:
    """What buf says of a contract against the released one; empty where nothing breaks."""
    done = subprocess.run([BUF, "breaking", proto, "--against", RELEASED], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 100), done.stderr
    return done.stdout


def test_the_contract_has_its_style_and_breaks_no_client() -> None:
    assert subprocess.run([BUF, "lint", ROOT / "proto"], check=False).returncode == 0
    assert breaks(ROOT / "proto") == ""


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("optional int64 top_k = 13;", "optional int64 top_k = 33;", "top_k"),
        ("optional int64 top_k = 13;", "optional string top_k = 13;", "changed type"),
        ("optional int64 top_k = 13;", "", "top_k"),
        ("rpc GetModel(", "rpc TellModel(", "GetModel"),
        ("MODE_AR = 2;", "MODE_AR = 7;", 'enum value "2" on enum "Mode"'),
    ],
)
def test_what_would_break_a_client_is_refused(tmp_path: Path, old: str, new: str, named: str) -> None:
    proto = shutil.copytree(ROOT / "proto", tmp_path / "proto")
    path = proto / "twotower" / "v1" / "inference.proto"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert named in breaks(proto)


def test_a_new_field_breaks_nobody(tmp_path: Path) -> None:
    proto = shutil.copytree(ROOT / "proto", tmp_path / "proto")
    path = proto / "twotower" / "v1" / "inference.proto"
    text = path.read_text()
    path.write_text(text.replace("message GenerateRequest {", "message GenerateRequest {\n  // New.\n  bool added = 999;"))
    assert breaks(proto) == ""


UNSAFE = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"send_object_list", "recv_object_list", "broadcast_object_list", "all_gather_object", "gather_object"}


def unsafe(source: str) -> Iterator[str]:
    """What of a source would unpickle what others wrote."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in UNSAFE)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in UNSAFE:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name.rpartition(".")[2] in UNSAFE_CALLS:
                yield name
            if name == "torch.load" and safe.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            if safe.get("allow_pickle", "False") != "False":
                yield "allow_pickle"


def test_nothing_is_unpickled() -> None:
    for package in (ROOT / "services", ROOT / "kernels"):
        for path in package.rglob("*.py"):
            assert not list(unsafe(path.read_text(encoding="utf-8"))), path


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "torch.load(f)", "np.load(f, allow_pickle=True)", "dist.send_object_list(x)"],
)
def test_the_search_for_pickle_finds_it(source: str) -> None:
    assert list(unsafe(source))
