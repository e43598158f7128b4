"""The `dist` transport: torch.distributed moves the bytes from rank 0, the context, to rank 1, the worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from twotower.errors import Incompatible
from twotower.internal.v1 import link_pb2
from twotower.transport.config import TransportKind
from twotower.transport.group import CONTEXT_RANK, WORKER_RANK, Group
from twotower.transport.interface import Header, Inlet, Outlet, Write
from twotower.transport.layout import device_of, lay_out, off_loop, pack
from twotower.wire.frames import Key

TAGS = 1 << 31


class DistOutlet(Outlet):
    """Announces a transfer on the stream, then sends it as one message of the link's own group."""

    kind = TransportKind.DIST

    def __init__(self, group: Group, closed: Callable[[bool], None]) -> None:
        """closed: called at the link's end, with whether any transfer was completed."""
        self.group = group
        self._closed = closed
        self._sent = 0

    async def send(self, tensors: Sequence[tuple[Key, Tensor]], header: Header, write: Write) -> None:
        """See `Outlet`. A cancelled send closes the group, since the worker may wait for the transfer it announced."""
        layout, group, number = lay_out(tensors), self.group, self._sent
        await group.joined()
        buffer = group.buffer(layout.length)
        piece = buffer[: layout.length]
        try:
            await off_loop(layout.length, device_of(tensors), lambda: pack(tensors, layout.parts, piece))
            await write(header(layout.placed(number)))
            await group.run(lambda channel: channel.send([piece], WORKER_RANK, number % TAGS))
        except BaseException:
            group.close()
            raise
        group.recycle(buffer)
        self._sent += 1

    async def close(self) -> None:
        """See `Outlet`."""
        self.group.close()
        self._closed(self._sent > 0)


class DistInlet(Inlet):
    """Receives into the group's buffers, which are reused."""

    kind = TransportKind.DIST

    def __init__(self, group: Group) -> None:
        self.group = group
        self._received = 0
        self._buffers: dict[int, Tensor] = {}

    async def fetch(self, placed: link_pb2.Placed) -> Tensor:
        """See `Inlet`. A cancelled fetch closes the group."""
        if placed.place != self._received:
            raise Incompatible(f"tensors.place: transfer {placed.place} of the group, where {self._received} is due")
        group, number, length = self.group, self._received, placed.length
        try:
            await group.joined()
            buffer = group.buffer(length)
            await group.run(lambda channel: channel.recv([buffer[:length]], CONTEXT_RANK, number % TAGS))
        except BaseException:
            group.close()
            raise
        self._received += 1
        self._buffers[number] = buffer
        return buffer[:length]

    def release(self, placed: link_pb2.Placed) -> None:
        """See `Inlet`. After the link's end, no buffer is kept."""
        if (buffer := self._buffers.pop(placed.place, None)) is not None:
            self.group.recycle(buffer)

    async def close(self) -> None:
        """See `Inlet`."""
        self._buffers.clear()
        self.group.close()
