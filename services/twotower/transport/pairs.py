"""The process groups of a process: made when two meet for the first time, dropped when one has gone."""

from __future__ import annotations

import asyncio
import ipaddress
import uuid
from typing import TYPE_CHECKING
from urllib.parse import unquote

import torch

from twotower.rpc.address import listening_socket
from twotower.transport.config import TransportConfig
from twotower.transport.dist import DistInlet, DistOutlet, ReceivingPair, SendingPair
from twotower.transport.group import CONTEXT_RANK, WORKER_RANK, Group, Meeting, local_address, store_at
from twotower.v1 import context_pb2

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


class ContextPairs:
    """A context's groups, one for each worker that has attachments or had them lately, and the store where they meet."""

    def __init__(self, host: str, device: torch.device, config: TransportConfig) -> None:
        """`host`: the address to listen on, for the store."""
        self._host = host
        self._device = device
        self._config = config
        self._store: Store | None = None
        self._store_host, self._store_port = "", 0
        self._pairs: dict[tuple[str, str], SendingPair] = {}
        self._users: dict[SendingPair, int] = {}
        self._timers: dict[SendingPair, asyncio.TimerHandle] = {}
        self._failed: set[tuple[str, str]] = set()

    def failed(self, peer: str, backend: str) -> bool:
        """Whether a group with that worker broke before anything went through."""
        self._sweep()
        return (peer, backend) in self._failed

    def attach(self, peer: str, backend: str, grpc_peer: str) -> tuple[DistOutlet, context_pb2.TransportChoice]:
        """An outlet to the worker process `peer`, which called from `grpc_peer`, and what it must know to join."""
        self._sweep()
        pair = self._pairs.get((peer, backend))
        if pair is None:
            pair = self._pairs[peer, backend] = SendingPair(Group(self._meeting(backend, _host_of(grpc_peer))))
        if timer := self._timers.pop(pair, None):
            timer.cancel()
        self._users[pair] = self._users.get(pair, 0) + 1
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._left(pair)

        choice = context_pb2.TransportChoice(
            kind=context_pb2.TRANSPORT_DIST, store_port=self._store_port, group=pair.group.name, backend=backend
        )
        return DistOutlet(pair, leave), choice

    def close(self) -> None:
        """Drop all groups."""
        for timer in self._timers.values():
            timer.cancel()
        for pair in self._pairs.values():
            pair.group.close()
        self._pairs.clear()
        self._store = None

    def _meeting(self, backend: str, worker_host: str) -> Meeting:
        self._listen()
        name, address, timeout_s = uuid.uuid4().hex, local_address(worker_host), self._config.timeout_s
        return Meeting(self._store_host, self._store_port, name, CONTEXT_RANK, backend, address, self._device, timeout_s)

    def _listen(self) -> None:
        """Open the store, which is there from the first group on."""
        if self._store is None:
            listener = listening_socket(self._host, 0, "--host")
            address, self._store_port = listener.getsockname()[:2]
            own = ipaddress.ip_address(address)
            loopback = "127.0.0.1" if own.version == 4 else "::1"
            self._store_host = loopback if own.is_unspecified else address
            self._store = store_at(self._store_host, self._store_port, self._config.timeout_s, listener)

    def _left(self, pair: SendingPair) -> None:
        self._users[pair] -= 1
        if not self._users[pair]:
            self._timers[pair] = asyncio.get_running_loop().call_later(self._config.idle_s, self._drop, pair)

    def _drop(self, pair: SendingPair) -> None:
        pair.group.close()
        self._sweep()

    def _sweep(self) -> None:
        """Forget groups that broke; who is still on one learns it with the next transfer."""
        for key in [key for key, pair in self._pairs.items() if pair.group.broken]:
            pair = self._pairs.pop(key)
            if not pair.proven:
                self._failed.add(key)
            if timer := self._timers.pop(pair, None):
                timer.cancel()


class WorkerPairs:
    """A worker's groups, one for each context."""

    def __init__(self, device: torch.device, config: TransportConfig) -> None:
        self._device = device
        self._config = config
        self._pairs: dict[str, ReceivingPair] = {}

    def attach(self, choice: context_pb2.TransportChoice, context_address: str) -> DistInlet:
        """An inlet in the group that the context at `context_address` chose; an older group with it is dropped."""
        pair = self._pairs.get(context_address)
        if pair is None or pair.group.broken or pair.group.name != choice.group:
            if pair is not None:
                pair.group.close()
            host = context_address.rpartition(":")[0].strip("[]")
            address, timeout_s = local_address(host), self._config.timeout_s
            meeting = Meeting(
                host, choice.store_port, choice.group, WORKER_RANK, choice.backend, address, self._device, timeout_s
            )
            pair = self._pairs[context_address] = ReceivingPair(Group(meeting), timeout_s)
        return DistInlet(pair)

    def close(self) -> None:
        """Drop all groups."""
        for pair in self._pairs.values():
            pair.group.close()
        self._pairs.clear()


def _host_of(grpc_peer: str) -> str:
    """The host of gRPC's name for a peer, as in ``ipv4:127.0.0.1:5000`` or ``ipv6:%5B::1%5D:5000``."""
    return unquote(grpc_peer).partition(":")[2].rpartition(":")[0].strip("[]")
