"""Which form of the computations is chosen."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from twotower_kernels.backend import Backend, BackendUnavailable, load, resolve


def test_backend_of_a_cpu_unless_told_otherwise() -> None:
    assert resolve("auto", torch.device("cpu")) == "cpu"
    assert resolve("torch", torch.device("cpu")) == "torch"
    assert resolve("torch", torch.device("cuda")) == "torch"
    with pytest.raises(BackendUnavailable, match="cuda"):
        resolve("cpu", torch.device("cuda"))


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_what_is_loaded(name: Backend) -> None:
    assert load(name).name == name


def test_backend_of_a_gpu_with_and_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert resolve("auto", torch.device("cuda")) == "triton"
    assert resolve("triton", torch.device("cuda")) == "triton"
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    assert resolve("auto", torch.device("cuda")) == "torch"
    with pytest.raises(BackendUnavailable, match="cannot be imported"):
        resolve("triton", torch.device("cuda"))


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET"):
        resolve("triton", torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", torch.device("cpu")) == "triton"


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'cuda'"):
        resolve("cuda", torch.device("cpu"))
