"""A process group of one context and one worker. Blocking calls run on the group's own thread."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from twotower.errors import Unavailable

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

NCCL = "nccl"
GLOO = "gloo"

CONTEXT_RANK, WORKER_RANK = 0, 1


def backends(device: torch.device) -> list[str]:
    """The torch.distributed backends that support a tower on `device`, the best first."""
    if not dist.is_available():
        return []
    nccl = [NCCL] if device.type == "cuda" and dist.is_nccl_available() else []
    return [*nccl, *([GLOO] if dist.is_gloo_available() else [])]


def local_address(peer: str) -> str:
    """Our own IP address on the route to host `peer`. gloo binds to it, whatever the machine's name resolves to."""
    family, _, _, _, address = socket.getaddrinfo(peer, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


class Channel(Protocol):
    """The part of torch's process groups that we use."""

    def send(self, tensors: list[Tensor], rank: int, tag: int, /) -> dist.Work:
        """Send one tensor to `rank`."""
        ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int, /) -> dist.Work:
        """Receive one tensor from `rank`."""
        ...

    def abort(self) -> None:
        """Abort the transfers under way."""
        ...


def store_at(host: str, port: int, timeout_s: float, listener: socket.socket | None = None) -> Store:
    """A connection to the key-value store at `host:port`; with a listening socket, the store itself."""
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]  # it exists, but torch does not declare it
        host,
        port,
        is_master=listener is not None,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=None if listener is None else listener.detach(),
    )
    return store


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where and how the two processes of a group find each other."""

    host: str
    port: int
    """The port of the key-value store. Each group has its own connection, since a wait blocks all users of one."""
    name: str
    """The group's name, unique in the store."""
    rank: int
    backend: str
    address: str
    """Our own address, as the peer reaches it."""
    device: torch.device
    timeout_s: float


class Group:
    """Moves bytes between the two processes, one transfer at a time and in order. Any failure closes the group."""

    def __init__(self, meeting: Meeting) -> None:
        self.name = meeting.name
        self.device = meeting.device if meeting.backend == NCCL else torch.device("cpu")
        """The device of its buffers."""
        self.broken = False
        self.failed = False
        """Whether it broke, rather than being closed."""
        self._timeout = timedelta(seconds=meeting.timeout_s)
        self._thread = ThreadPoolExecutor(1, f"group-{meeting.name}")
        self._spare: list[Tensor] = []
        self._channel: Channel | None = None
        self._joined = asyncio.ensure_future(self._on_thread(lambda: self._join(meeting)))
        # Retrieved, so that asyncio does not report it; `joined` raises it.
        self._joined.add_done_callback(lambda task: None if task.cancelled() else task.exception())

    async def joined(self) -> None:
        """Wait until both processes have joined. Raises Unavailable."""
        await asyncio.shield(self._joined)
        if self.broken:
            raise Unavailable(f"process group {self.name} broke")

    async def run(self, move: Callable[[Channel], dist.Work]) -> None:
        """Run one `move` and wait for its end. The move itself goes on if the caller is cancelled. Raises Unavailable."""
        await self.joined()
        await asyncio.shield(self._on_thread(lambda: self._wait(move)))

    def buffer(self, size: int) -> Tensor:
        """A buffer of at least `size` bytes, uint8; a reused one is preferred, since it is cheaper than new memory."""
        for i, spare in enumerate(self._spare):
            if spare.numel() >= size:
                return self._spare.pop(i)
        self._spare.clear()
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def recycle(self, buffer: Tensor) -> None:
        """Keep a buffer for a later transfer."""
        self._spare.append(buffer)

    def close(self) -> None:
        """Leave the group. A transfer under way fails at both ends."""
        self.broken = True
        self._spare.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.abort()

    async def _on_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except RuntimeError as error:  # from torch: a timeout or a broken connection; from the executor: it is closed
            self.failed = self.failed or not self.broken
            self.close()
            reason = str(error).partition("\n")[0]
            raise Unavailable(f"process group {self.name} broke: {reason}") from None

    def _join(self, meeting: Meeting) -> None:
        client = store_at(meeting.host, meeting.port, self._timeout.total_seconds())
        store = dist.PrefixStore(meeting.name, client)  # type: ignore[attr-defined]  # as above
        if meeting.backend == NCCL:
            torch.cuda.set_device(meeting.device)
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = self._timeout
            self._channel = cast(Channel, dist.ProcessGroupNCCL(store, meeting.rank, 2, nccl))
        else:
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's own name for Options
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=meeting.address)]
            gloo._timeout = self._timeout
            self._channel = cast(Channel, dist.ProcessGroupGloo(store, meeting.rank, 2, gloo))
        if self.broken:  # closed while the two processes joined
            self.close()
            raise RuntimeError("it is closed")

    def _wait(self, move: Callable[[Channel], dist.Work]) -> None:
        channel = self._channel
        if channel is None:
            raise RuntimeError("it is closed")
        move(channel).wait(self._timeout)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # NCCL's wait is the stream's, not ours
