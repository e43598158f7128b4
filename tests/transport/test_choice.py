"""Which transport two ends agree on, and how they refuse each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.support.transports import CPU, WORKER_PEER, ends
from twotower.errors import ConfigError, Incompatible
from twotower.internal.v1 import link_pb2
from twotower.transport import ends as ends_module
from twotower.transport.config import CHOICES, TransportConfig, TransportKind
from twotower.transport.ends import KIND_FROM_PB, ContextTransports, WorkerTransports
from twotower.transport.group import NCCL
from twotower.transport.pairs import ContextPairs


async def _chosen(context: str, worker: str, **changes: Any) -> TransportKind:
    """What they agree on, after `changes` to the worker's offer."""
    config = TransportConfig.of(context), TransportConfig.of(worker)
    async with ends(*(dataclasses.replace(each, timeout_s=1) for each in config)) as both:
        for field, value in changes.items():
            both.worker.offer.ClearField(field)  # type: ignore[arg-type]
            both.worker.offer.MergeFrom(link_pb2.TransportOffer(**{field: value}))
        outlet, choice = both.context.attach(both.worker.offer, WORKER_PEER)
        inlet = both.worker.attach(choice, "127.0.0.1:1")
        assert outlet.kind == inlet.kind == KIND_FROM_PB[choice.kind]
        return outlet.kind


async def test_on_one_machine_it_is_shared_memory() -> None:
    assert await _chosen("auto", "auto") is TransportKind.SHM


@pytest.mark.parametrize("kind", list(TransportKind))
async def test_what_either_end_insists_on(kind: TransportKind) -> None:
    for context, worker in ((kind, kind), (kind, "auto"), ("auto", kind)):
        assert await _chosen(context, worker) is kind


@pytest.mark.parametrize("changes", [{"host": "another"}, {"shm_socket": "nobody"}])
async def test_otherwise_it_is_frames(changes: dict[str, Any]) -> None:
    assert await _chosen("auto", "auto", **changes) is TransportKind.GRPC


async def test_a_worker_without_an_offer_gets_frames() -> None:
    async with ends(TransportConfig()) as both:
        outlet, _ = both.context.attach(link_pb2.TransportOffer(), WORKER_PEER)
        assert outlet.kind is TransportKind.GRPC


@pytest.mark.parametrize(
    ("context", "worker", "changes", "named"),
    [
        ("dist", "grpc", {}, "transport.kinds: the worker offers grpc, the context uses dist only"),
        ("grpc", "shm", {}, "transport.kinds: the worker offers shm, the context uses grpc only"),
        ("shm", "auto", {"host": "another"}, "transport.host"),
        ("auto", "shm", {"host": "another"}, "transport.host"),
        ("shm", "shm", {"shm_socket": "nobody"}, "transport.shm_socket"),
        ("dist", "dist", {"backends": ["mpi"]}, "transport.backends"),
    ],
)
async def test_a_pair_that_cannot(context: str, worker: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(Incompatible, match=named):
        await _chosen(context, worker, **changes)


async def test_a_worker_takes_only_what_it_offered() -> None:
    worker = WorkerTransports(TransportConfig.of("grpc"), CPU)
    with pytest.raises(Incompatible, match=r"transport\.kind"):
        worker.attach(link_pb2.TransportChoice(kind=link_pb2.TRANSPORT_SHM), "127.0.0.1:1")
    worker.close()


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Two towers on GPUs: this machine need not have any, as no group is made."""
    monkeypatch.setattr(ends_module, "backends", lambda device: [NCCL, "gloo"])
    asked: list[tuple[str, str]] = []

    def attach(self: object, peer: str, backend: str, grpc_peer: str) -> None:
        asked.append((peer, backend))

    monkeypatch.setattr(ContextPairs, "attach", attach)
    return asked


async def test_between_gpus_of_two_machines_it_is_nccl(on_gpus: list[tuple[str, str]]) -> None:
    async with ends(TransportConfig()) as both:
        both.context._gpu, both.worker.offer.gpu = "GPU-1", "GPU-2"
        both.worker.offer.host = "another"
        both.context.attach(both.worker.offer, WORKER_PEER)
        assert on_gpus == [(both.worker.offer.peer, NCCL)]
        both.worker.offer.gpu = "GPU-1"  # one GPU: nccl refuses that
        outlet, _ = both.context.attach(both.worker.offer, WORKER_PEER)
        assert outlet.kind is TransportKind.GRPC


def test_what_the_system_lacks_is_reported_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends_module, "backends", lambda device: [])
    with pytest.raises(ConfigError, match="transport: dist"):
        ContextTransports(TransportConfig(TransportKind.DIST), "127.0.0.1", torch.device("cpu"))
    monkeypatch.delattr("os.memfd_create")
    with pytest.raises(ConfigError, match="transport: shm"):
        ContextTransports(TransportConfig(TransportKind.SHM), "127.0.0.1", torch.device("cpu"))


def test_choices() -> None:
    assert CHOICES == ("auto", "grpc", "shm", "dist")
