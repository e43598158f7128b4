"""The `dist` transport: the bytes go by torch.distributed, from rank 0, the context, to rank 1, the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable

from torch import Tensor

from twotower.errors import Incompatible, Unavailable
from twotower.transport.config import Kind
from twotower.transport.group import CONTEXT_RANK, WORKER_RANK, Group
from twotower.transport.interface import Inlet, Outlet, listed
from twotower.transport.layout import device_of, lay_out, off_loop, pack
from twotower.v1 import context_pb2
from twotower.wire.frames import Key

TAGS = 1 << 31


class SendingPair:
    """A context's part of a group, shared by the attachments of one worker: transfers one by one, numbered."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.turn = asyncio.Lock()
        self.sent = 0
        self.proven = False
        """A transfer has come to its end."""


class DistOutlet(Outlet):
    """Says what comes on the stream, then sends it as one message of the group."""

    kind = Kind.DIST

    def __init__(self, pair: SendingPair, leave: Callable[[], None]) -> None:
        """`leave` is called when the attachment is over."""
        self._pair = pair
        self._leave = leave

    async def send(self, tensors: Iterable[tuple[Key, Tensor]]) -> AsyncGenerator[context_pb2.ContextMessage]:
        """See `Outlet`. Left before its end, it ends the group: the worker may wait for what was announced."""
        pair, group = self._pair, self._pair.group
        known = await listed(tensors)
        layout = lay_out(known)
        async with pair.turn:
            await group.joined()
            number, pair.sent = pair.sent, pair.sent + 1
            buffer = group.buffer(layout.length)
            piece = buffer[: layout.length]
            try:
                await off_loop(layout.length, device_of(known), lambda: pack(known, layout.parts, piece))
                yield layout.message(number)
                await group.run(lambda channel: channel.send([piece], WORKER_RANK, number % TAGS))
            except BaseException:
                group.close()
                raise
            group.recycle(buffer)
            pair.proven = True

    async def close(self) -> None:
        """See `Outlet`."""
        self._leave()


class ReceivingPair:
    """A worker's part of a group: transfers are taken in the order of their numbers, whichever attachment hears first."""

    def __init__(self, group: Group, timeout_s: float) -> None:
        self.group = group
        self._timeout_s = timeout_s
        self._turn = asyncio.Condition()
        self._received = 0
        self._tasks: set[asyncio.Task[Tensor]] = set()

    async def receive(self, number: int, length: int) -> Tensor:
        """A buffer that begins with the transfer's bytes. Cancelled, it still takes its turn. Raises Unavailable."""
        task = asyncio.create_task(self._receive(number, length))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    async def _receive(self, number: int, length: int) -> Tensor:
        if number < self._received:
            raise Incompatible(f"placed.place: transfer {number} of the group is over")
        await self.group.joined()
        try:
            async with asyncio.timeout(self._timeout_s), self._turn:
                await self._turn.wait_for(lambda: self._received == number)
        except TimeoutError:
            self.group.close()
            raise Unavailable(f"process group {self.group.name} broke: transfer {self._received} was never told of") from None
        buffer = self.group.buffer(length)
        await self.group.run(lambda channel: channel.recv([buffer[:length]], CONTEXT_RANK, number % TAGS))
        async with self._turn:
            self._received += 1
            self._turn.notify_all()
        return buffer

    def _done(self, task: asyncio.Task[Tensor]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told by who waits, if anyone does


class DistInlet(Inlet):
    """Receives into buffers of the group, which are used again."""

    kind = Kind.DIST

    def __init__(self, pair: ReceivingPair) -> None:
        self._pair = pair
        self._buffers: dict[int, Tensor] = {}

    async def fetch(self, placed: context_pb2.Placed) -> Tensor:
        """See `Inlet`."""
        buffer = self._buffers[placed.place] = await self._pair.receive(placed.place, placed.length)
        return buffer[: placed.length]

    def release(self, placed: context_pb2.Placed) -> None:
        """See `Inlet`."""
        self._pair.group.recycle(self._buffers.pop(placed.place))

    async def close(self) -> None:
        """Groups belong to the process, not to the attachment."""
