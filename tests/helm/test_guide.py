"""Commands of the pages for operators: those of Helm are run, or, where they need a cluster, rendered with the same options."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.documents import ROOT, Fenced, fenced
from tests.support.tools import helm

PAGES = (ROOT / "docs" / "operations.md", ROOT / "helm" / "twotower" / "README.md")


def sessions(page: Path) -> list[Fenced]:
    return [block for block in fenced(page) if block.language == "shellsession"]


def commands(page: Path) -> list[str]:
    found = []
    for block in sessions(page):
        for line in block.text.splitlines():
            assert line.startswith("$ "), f"{page}:{block.line}: {line}"
            found.append(line.removeprefix("$ "))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_helm_understands_its_commands(page: Path, tmp_path: Path) -> None:
    for name in ("helm", "deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    seen = 0
    for command in commands(page):
        words = [word for word in shlex.split(command) if "=" not in word or not word.split("=")[0].isupper()]
        if words[0] == "cp":
            shutil.copy(tmp_path / words[1], tmp_path / words[2])
        if words[0] != "helm":
            continue
        seen += 1
        if words[1] in ("install", "upgrade"):
            words = [words[0], "template", *(word for word in words[2:] if word != "--create-namespace")]
        if words[1] == "test":
            words = [words[0], "test", "--help"]
        done = subprocess.run([str(helm(4)), *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if words[1] == "template":
            assert len([found for found in yaml.safe_load_all(done.stdout) if found]) > 10
    assert seen >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_commands_name_are_there(page: Path) -> None:
    for command in commands(page):
        for word in shlex.split(command):
            if word.startswith(("deploy/", "helm/")):
                assert (ROOT / word).exists(), command


def test_objects_that_commands_name_are_rendered() -> None:
    """A release called tt has Deployments called so."""
    words = [str(helm(4)), "template", "tt", str(ROOT / "helm" / "twotower"), "--namespace", "serving"]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    names = {found["metadata"]["name"] for found in yaml.safe_load_all(text) if found and found["kind"] == "Deployment"}
    named = {
        word.partition("/")[2] for command in commands(PAGES[0]) for word in command.split() if word.startswith("deployment/")
    }
    assert named
    assert named <= names
