"""The process groups of `dist`: made for a link, and dropped with it."""

from __future__ import annotations

import ipaddress
import uuid
from typing import TYPE_CHECKING
from urllib.parse import unquote

import torch

from twotower.internal.v1 import link_pb2
from twotower.rpc.address import listening_socket
from twotower.transport.config import TransportConfig
from twotower.transport.dist import DistInlet, DistOutlet
from twotower.transport.group import CONTEXT_RANK, WORKER_RANK, Group, Meeting, local_address, store_at

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

MAX_FAILED = 256
"""The most failed pairs that are remembered. Every worker process has a new name, so that their number has no bound."""


class ContextPairs:
    """A context's open groups, one for each link, and the store through which the two ends of each find each other."""

    def __init__(self, host: str, device: torch.device, config: TransportConfig) -> None:
        """host: the address to listen on, for the store."""
        self._host = host
        self._device = device
        self._config = config
        self._store: Store | None = None
        self._store_host, self._store_port = "", 0
        self._groups: set[Group] = set()
        self._failed: dict[tuple[str, str], None] = {}

    @property
    def open(self) -> int:
        """The number of groups in use."""
        return len(self._groups)

    def failed(self, peer: str, backend: str) -> bool:
        """Whether a group with that worker broke before any transfer was completed."""
        return (peer, backend) in self._failed

    def attach(self, peer: str, backend: str, grpc_peer: str) -> tuple[DistOutlet, link_pb2.TransportChoice]:
        """An outlet to the worker process `peer`, which called from `grpc_peer`, and the message from which it can join."""
        group = Group(self._meeting(backend, _host_of(grpc_peer)))
        self._groups.add(group)

        def closed(proven: bool) -> None:
            self._groups.discard(group)
            if group.failed and not proven:
                self._failed[peer, backend] = None
                while len(self._failed) > MAX_FAILED:
                    del self._failed[next(iter(self._failed))]

        choice = link_pb2.TransportChoice(
            kind=link_pb2.TRANSPORT_DIST, store_port=self._store_port, group=group.name, backend=backend
        )
        return DistOutlet(group, closed), choice

    def close(self) -> None:
        """Close all groups."""
        for group in self._groups:
            group.close()
        self._groups.clear()
        self._store = None

    def _meeting(self, backend: str, worker_host: str) -> Meeting:
        self._listen()
        name, address, timeout_s = uuid.uuid4().hex, local_address(worker_host), self._config.timeout_s
        return Meeting(self._store_host, self._store_port, name, CONTEXT_RANK, backend, address, self._device, timeout_s)

    def _listen(self) -> None:
        """Open the store, unless an earlier group did."""
        if self._store is None:
            listener = listening_socket(self._host, 0, "--host")
            address, self._store_port = listener.getsockname()[:2]
            own = ipaddress.ip_address(address)
            loopback = "127.0.0.1" if own.version == 4 else "::1"
            self._store_host = loopback if own.is_unspecified else address
            self._store = store_at(self._store_host, self._store_port, self._config.timeout_s, listener)


def join(choice: link_pb2.TransportChoice, context_address: str, device: torch.device, config: TransportConfig) -> DistInlet:
    """A worker's inlet in the group that the context at `context_address` chose."""
    host = context_address.rpartition(":")[0].strip("[]")
    meeting = Meeting(
        host,
        choice.store_port,
        choice.group,
        WORKER_RANK,
        choice.backend,
        local_address(host),
        device,
        config.timeout_s,
    )
    return DistInlet(Group(meeting))


def _host_of(grpc_peer: str) -> str:
    """The host of gRPC's name for a peer, as in ``ipv4:127.0.0.1:5000`` or ``ipv6:%5B::1%5D:5000``."""
    return unquote(grpc_peer).partition(":")[2].rpartition(":")[0].strip("[]")
