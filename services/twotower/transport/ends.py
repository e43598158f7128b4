"""The two ends of all transports, one object per process, and the choice of a transport when a worker attaches."""

from __future__ import annotations

import os
import uuid
from functools import cache
from pathlib import Path

import torch

from twotower.errors import ConfigError, Incompatible
from twotower.internal.v1 import link_pb2
from twotower.transport.config import TransportConfig, TransportKind
from twotower.transport.frames import FrameInlet, FrameOutlet
from twotower.transport.group import GLOO, NCCL, backends
from twotower.transport.inbox import SegmentInbox
from twotower.transport.interface import Inlet, Outlet
from twotower.transport.pairs import ContextPairs, join
from twotower.transport.segments import SegmentPool
from twotower.transport.shm import ShmInlet, ShmOutlet

KIND_TO_PB = {
    TransportKind.GRPC: link_pb2.TRANSPORT_GRPC,
    TransportKind.SHM: link_pb2.TRANSPORT_SHM,
    TransportKind.DIST: link_pb2.TRANSPORT_DIST,
}
KIND_FROM_PB = {value: key for key, value in KIND_TO_PB.items()}

Chosen = tuple[Outlet, link_pb2.TransportChoice]


class ContextTransports:
    """A context's end: chooses from a worker's offer, and opens an outlet to it. Use it in the event loop only."""

    def __init__(self, config: TransportConfig, host: str, device: torch.device) -> None:
        """`host`: the address the service listens on. Raises ConfigError if this machine lacks the configured transport."""
        check_possible(config, device)
        self._config = config
        self._backends = backends(device)
        self._gpu = gpu_of(device)
        self._segments = SegmentPool(config.shm_bytes)
        self._pairs = ContextPairs(host, device, config)

    def attach(self, offer: link_pb2.TransportOffer, grpc_peer: str) -> Chosen:
        """The best transport that both support, or the one that either is set to. Raises Incompatible, naming the field.

        `grpc_peer`: gRPC's name for the worker's address.
        """
        offered = [KIND_FROM_PB[kind] for kind in offer.kinds if kind in KIND_FROM_PB] or [TransportKind.GRPC]
        wanted = self._config.kind
        if wanted is not None and wanted not in offered:
            raise Incompatible(f"transport.kinds: the worker offers {', '.join(offered)}, the context uses {wanted} only")
        refusals = []
        best_first = (
            (TransportKind.SHM, ""),
            (TransportKind.DIST, NCCL),
            (TransportKind.GRPC, ""),
            (TransportKind.DIST, GLOO),
        )
        for kind, backend in best_first:
            if kind not in offered or wanted not in (None, kind):
                continue
            chosen = self._try(kind, backend, offer, grpc_peer)
            if not isinstance(chosen, str):
                return chosen
            refusals.append(chosen)
        raise Incompatible("; ".join(refusals))

    def close(self) -> None:
        """Release all memory and connections."""
        self._segments.close()
        self._pairs.close()

    def _try(self, kind: TransportKind, backend: str, offer: link_pb2.TransportOffer, grpc_peer: str) -> Chosen | str:
        """An outlet, or the reason why there is none, which begins with the field that differs."""
        if kind is TransportKind.GRPC:
            return FrameOutlet(), link_pb2.TransportChoice(kind=link_pb2.TRANSPORT_GRPC)
        if kind is TransportKind.SHM:
            if not shm_possible():
                return "transport.kinds: the context's system has no shared memory for shm"
            if offer.host != host_token():
                return (
                    f"transport.host: the worker is on {offer.host!r}, the context on {host_token()!r}; shm needs one machine"
                )
            segments = self._segments.connect(offer.shm_socket)
            if segments is None:
                return f"transport.shm_socket: the worker's socket {offer.shm_socket!r} cannot be reached"
            return ShmOutlet(segments), link_pb2.TransportChoice(kind=link_pb2.TRANSPORT_SHM)
        if backend not in self._backends or backend not in offer.backends:
            offered, supported = ", ".join(offer.backends), ", ".join(self._backends)
            return f"transport.backends: {backend} is not on both sides (worker: {offered}; context: {supported})"
        if backend == NCCL and offer.gpu == self._gpu:
            return f"transport.gpu: both towers are on {self._gpu}; nccl needs two GPUs"
        if self._config.kind is None and self._pairs.failed(offer.peer, backend):
            return f"transport.backends: {backend} failed between these two before"
        return self._pairs.attach(offer.peer, backend, grpc_peer)


class WorkerTransports:
    """A worker's end: makes offers, and opens an inlet for the chosen transport. Make it in a running event loop."""

    def __init__(self, config: TransportConfig, device: torch.device) -> None:
        """Raises ConfigError if this machine lacks the configured transport."""
        check_possible(config, device)
        kinds = [kind for kind in TransportKind if config.kind in (None, kind) and _possible(kind, device)]
        self._inbox = SegmentInbox() if TransportKind.SHM in kinds else None
        self._config, self._device = config, device
        self.offer = link_pb2.TransportOffer(
            kinds=[KIND_TO_PB[kind] for kind in kinds],
            peer=uuid.uuid4().hex,
            host=host_token() if self._inbox else "",
            shm_socket=self._inbox.address if self._inbox else "",
            backends=backends(device) if TransportKind.DIST in kinds else [],
            gpu=gpu_of(device),
        )
        """The offer that `Hello` carries."""

    def attach(self, choice: link_pb2.TransportChoice, context_address: str) -> Inlet:
        """The inlet for the transport that the context at `context_address` chose. Raises Incompatible."""
        if choice.kind not in (*self.offer.kinds, link_pb2.TRANSPORT_UNSPECIFIED):
            raise Incompatible(f"transport.kind: the context chose {choice.kind}, which this worker did not offer")
        if choice.kind == link_pb2.TRANSPORT_SHM and self._inbox is not None:
            return ShmInlet(self._inbox)
        if choice.kind == link_pb2.TRANSPORT_DIST:
            return join(choice, context_address, self._device, self._config)
        return FrameInlet()

    def close(self) -> None:
        """Release all memory and connections."""
        if self._inbox is not None:
            self._inbox.close()


def check_possible(config: TransportConfig, device: torch.device) -> None:
    """Raise ConfigError if this process cannot use the configured transport."""
    if config.kind is not None and not _possible(config.kind, device):
        raise ConfigError(f"transport: {config.kind} is not available on this system")


def shm_possible() -> bool:
    """Whether the system has memory files (memfd, on Linux)."""
    return hasattr(os, "memfd_create")


@cache
def host_token() -> str:
    """Names the machine and network namespace: equal in two processes that can reach each other's abstract unix sockets."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"


def gpu_of(device: torch.device) -> str:
    """The identity of a CUDA device; empty for other devices."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _possible(kind: TransportKind, device: torch.device) -> bool:
    return kind is TransportKind.GRPC or (shm_possible() if kind is TransportKind.SHM else bool(backends(device)))
