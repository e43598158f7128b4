from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from twotower_kernels.cpu import build as module
from twotower_kernels.cpu.build import NEEDED, build, load

able = pytest.mark.skipif(
    not module._cpu_flags() >= NEEDED or shutil.which("c++") is None, reason="no AVX-512 BF16, or no compiler"
)


@able
def test_processes_that_build_at_once_do_not_disturb_one_another(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from twotower_kernels.cpu.build import build; print(build(Path({str(tmp_path)!r})))"
    builders = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {builder.communicate(timeout=120)[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0] * 3
    (library,) = map(Path, paths)
    assert list(tmp_path.iterdir()) == [library]
    assert hasattr(ctypes.CDLL(str(library)), "tt_linear")


@able
def test_a_library_that_is_there_is_not_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(tmp_path)
    changed = first.stat().st_mtime_ns
    assert build(tmp_path) == first
    assert first.stat().st_mtime_ns == changed
    sources = tmp_path / "other"
    sources.mkdir()
    (sources / "other.cpp").write_text('extern "C" int tt_other() { return 1; }\n')
    monkeypatch.setattr(module, "SOURCES", sources)
    assert build(tmp_path) != first


@pytest.fixture
def fresh() -> None:
    load.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "_cpu_flags", lambda: NEEDED)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert "no C++ compiler" in caplog.text
    load.cache_clear()


@able
@pytest.mark.usefixtures("fresh")
def test_source_that_does_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "broken.cpp").write_text("int broken(\n")
    monkeypatch.setattr(module, "SOURCES", tmp_path)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert load() is None
    assert "the compiler failed" in caplog.text
    load.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_cpu_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cpu_flags", lambda: frozenset({"avx2"}))
    assert load() is None
    load.cache_clear()
