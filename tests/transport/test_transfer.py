"""What every transport must do: the same bits come out, what does not fit is named, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.transports import (
    CPU,
    WORKER_PEER,
    Ends,
    Stream,
    arrive,
    ends,
    header,
    joined,
    mapped_segments,
    messages,
    placed_in,
    receive,
    same_bits,
    send,
    spec_of,
    transfer,
)
from tests.support.waiting import until
from twotower.engine.context_engine import ContextEngine
from twotower.errors import Incompatible, Unavailable
from twotower.internal.v1 import link_pb2
from twotower.model.checkpoint import Checkpoint
from twotower.model.delta_batch import DeltaBatch, apply_batch
from twotower.model.pool import PAGE, PoolSize, StatePool
from twotower.model.state import ContextState
from twotower.model.weights import load_context_tower
from twotower.request import GenerationParams
from twotower.transport import pairs
from twotower.transport.config import TransportConfig, TransportKind
from twotower.transport.dist import DistInlet
from twotower.transport.interface import Inlet, Outlet
from twotower.transport.layout import ALIGNMENT
from twotower.wire.frames import MESSAGE_BYTES, Key, Spec
from twotower.wire.state import delta_from, delta_spec, delta_tensors, fill_state, state_spec, state_tensors
from twotower_kernels.backend import load

KINDS = pytest.mark.parametrize("kind", list(TransportKind))
BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpu"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
BLOCK = 16


@pytest.fixture
async def both(kind: TransportKind) -> AsyncIterator[Ends]:
    async with ends(TransportConfig(kind, timeout_s=10)) as pair:
        yield pair


def _tensors(seed: int = 0) -> dict[Key, Tensor]:
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31 - 1, (1001,), generator=g, dtype=torch.int64).to(torch.int32)
    return {
        Key("big", 0): torch.randn(3, 500_000, generator=g),
        Key("small", 1): torch.randn(5, generator=g).bfloat16(),
        Key("one", 1): torch.randn((), generator=g),
        Key("none", 2): torch.empty(2, 0, 4),
        Key("odd", 2): torch.randn(3, 7, 11, generator=g).bfloat16(),
        Key("strided", 3): torch.randn(6, 8, generator=g).t(),
        Key("tail", 3): torch.randn(33, 4, generator=g).bfloat16()[:, 1:],
        Key("any bits", 4): bits.view(torch.float32),  # NaNs of all kinds among them
    }


def _arrived(got: Mapping[Key, Tensor], sent: Mapping[Key, Tensor]) -> bool:
    return got.keys() == sent.keys() and all(same_bits(got[key], sent[key]) for key in sent)


@KINDS
async def test_all_sizes_and_layouts_arrive_bit_for_bit(both: Ends) -> None:
    outlet, inlet = both.attach()
    for seed in range(3):
        tensors = _tensors(seed)
        assert _arrived(await transfer(outlet, inlet, tensors.items(), spec_of(tensors)), tensors)
    for nothing in ({Key("none", 0): torch.empty(0, 3)}, {}):
        assert _arrived(await transfer(outlet, inlet, nothing.items(), spec_of(nothing)), nothing)
    assert _arrived(await transfer(outlet, inlet, tensors.items(), spec_of(tensors)), tensors)


@KINDS
async def test_what_a_worker_is_told_of_a_transfer(both: Ends) -> None:
    """One header, with what it is about, before the tensors or beside them; and how large they are together."""
    tensors = _tensors()
    outlet, inlet = both.attach()
    stream = Stream()
    sending = asyncio.create_task(send(outlet, tensors.items(), stream))
    announced = await stream.read()
    assert announced is not None
    assert announced.HasField("state")
    assert (placed_in(announced) is None) == (outlet.kind is TransportKind.GRPC)
    received = await inlet.receive(placed_in(announced), spec_of(tensors), CPU, stream.read)
    await sending
    assert received.size == sum(tensor.nbytes for tensor in tensors.values())
    assert _arrived(received.tensors, tensors)
    received.release()
    assert await stream.read() == link_pb2.ContextMessage(ended=link_pb2.Ended())  # nothing of the transfer is left there


async def test_frames_are_written_one_message_at_a_time() -> None:
    """As fast as the stream takes them: a large state is never all in memory as messages."""
    tensors = {Key("ssm", i): torch.zeros(MESSAGE_BYTES // 4) for i in range(4)}
    writing = most = 0

    async def write(message: link_pb2.ContextMessage) -> None:
        nonlocal writing, most
        writing += 1
        most = max(most, writing)
        assert message.ByteSize() < MESSAGE_BYTES + 1000
        await asyncio.sleep(0.001)
        writing -= 1

    async with ends(TransportConfig(TransportKind.GRPC)) as both:
        outlet, _ = both.attach()
        await outlet.send(list(tensors.items()), header, write)
    assert (writing, most) == (0, 1)


class Follower:
    """A worker's states of a context's sessions, at the other end of a link."""

    def __init__(self, engine: ContextEngine, both: Ends, pool: StatePool | None) -> None:
        self.engine, self.pool = engine, pool
        self.ends: tuple[Outlet, Inlet] = both.attach()
        self.states: dict[str, ContextState] = {}
        self.rates: Mapping[int, Tensor] = {}

    async def take_state(self, name: str, state: ContextState) -> None:
        tower = self.engine.tower
        expected = state_spec(tower.config, tower.dtype, state.length)
        received = await arrive(*self.ends, state_tensors(state, self.engine.decay_rates), expected)
        own = self.pool.acquire(4 * PAGE) if self.pool else ContextState.alone(tower.config, tower.dtype, CPU)
        rates = fill_state(own, received.tensors, state.length)
        self.rates = {layer: rate.clone() for layer, rate in rates.items()}
        received.release()
        self.states[name] = own

    async def take_committed(self, deltas: DeltaBatch, names: list[str]) -> None:
        """A batch whose rows are of these sessions, some of which may have left."""
        tower = self.engine.tower
        expected = delta_spec(tower.config, tower.dtype, len(names), deltas.length)
        received = await arrive(*self.ends, delta_tensors(deltas), expected)
        came = delta_from(received.tensors, tower.config, deltas.length)
        here = [row for row, name in enumerate(names) if name in self.states]
        apply_batch([self.states[names[row]] for row in here], came.select(here), self.rates, tower.kernels)
        received.release()

    def same(self, name: str, state: ContextState) -> bool:
        """All bits that any forward reads."""
        theirs = dict(state_tensors(self.states[name], self.rates))
        return _arrived(theirs, dict(state_tensors(state, self.engine.decay_rates)))


def _engine(directory: Path, dtype: torch.dtype, backend: str = "torch") -> ContextEngine:
    checkpoint = Checkpoint.open(write_tiny_checkpoint(directory))
    tower = load_context_tower(checkpoint, dtype, CPU)
    tower.kernels = load(backend)  # type: ignore[arg-type]
    return ContextEngine(tower)


def _blocks(rows: int, seed: int) -> list[list[int]]:
    blocks: list[list[int]] = torch.randint(0, 96, (rows, BLOCK), generator=torch.Generator().manual_seed(seed)).tolist()
    return blocks


@KINDS
@DTYPES
@pytest.mark.parametrize("prompt", [[5], [5, 6, 7]])
async def test_a_worker_follows_the_context(tmp_path: Path, both: Ends, dtype: torch.dtype, prompt: list[int]) -> None:
    """A snapshot, then blocks by deltas: at every border both hold the same bits."""
    engine = _engine(tmp_path, dtype)
    state = ContextState.alone(engine.tower.config, dtype, CPU)
    session = engine.open("test", prompt, GenerationParams(), state=state)
    worker = Follower(engine, both, None)
    expected = state_spec(engine.tower.config, dtype, 0)
    empty = await transfer(*worker.ends, state_tensors(state, engine.decay_rates), expected)
    assert all(tensor.numel() == 0 for key, tensor in empty.items() if key.name in "kv")  # before the first token

    engine.prefill(session, len(prompt))
    await worker.take_state("test", state)
    for seed in range(4):
        assert worker.same("test", state)
        (block,) = _blocks(1, seed)
        (delta,) = engine.commit([(session, block)])
        await worker.take_committed(DeltaBatch.of(delta), ["test"])
    assert worker.same("test", state)
    assert worker.states["test"].length == state.length == len(prompt) + 4 * BLOCK


@KINDS
@DTYPES
@BACKENDS
async def test_a_worker_follows_many_sessions_by_batches(tmp_path: Path, both: Ends, dtype: torch.dtype, backend: str) -> None:
    """One commit and one transfer for all of them: some of its rows are another worker's, and sessions leave and come."""
    engine = _engine(tmp_path, dtype, backend)
    config = engine.tower.config
    pool = StatePool(config, dtype, CPU, PoolSize(5, 5 * 4))
    worker = Follower(engine, both, StatePool(config, dtype, CPU, PoolSize(5, 5 * 4)))
    sessions = {}
    for i, length in enumerate((1, 3, PAGE - 5, PAGE, 20)):  # blocks within pages, and across their borders
        prompt = torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(i)).tolist()
        sessions[f"s{i}"] = session = engine.open(f"s{i}", prompt, GenerationParams(), state=pool.acquire(4 * PAGE))
        engine.prefill(session, length)
    for name in ("s4", "s0", "s2", "s1"):  # in other slots than the context's; s3 is another worker's
        await worker.take_state(name, sessions[name].state)
    rounds = [["s0", "s1", "s2", "s3", "s4"], ["s4", "s2"], ["s3", "s0"], ["s2", "s0", "s1", "s4"]]
    for seed, names in enumerate(rounds):
        work = list(zip([sessions[name] for name in names], _blocks(len(names), seed), strict=True))
        deltas = engine.commit_together(work)
        own = [row for row, name in enumerate(names) if name != "s3"]
        await worker.take_committed(deltas.select(own), [names[row] for row in own])
        assert all(worker.same(name, sessions[name].state) for name in worker.states)
    worker.pool.release(worker.states.pop("s1"))  # type: ignore[union-attr]
    work = list(zip([sessions[f"s{i}"] for i in range(5)], _blocks(5, 9), strict=True))
    await worker.take_committed(engine.commit_together(work), list(sessions))  # with rows of s1, which left, and of s3
    await worker.take_state("s3", sessions["s3"].state)  # in the slot of the one that left
    assert all(worker.same(name, sessions[name].state) for name in ("s0", "s2", "s3", "s4"))


@KINDS
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({Key("k", 1): Spec(torch.float32, (2, 2))}, "frame 'q' of layer 1: not expected"),
        ({Key("q", 2): Spec(torch.float32, (2, 2))}, "frame 'q' of layer 1: not expected"),
        ({Key("q", 1): Spec(torch.bfloat16, (2, 2))}, "frame 'q' of layer 1: dtype"),
        ({Key("q", 1): Spec(torch.float32, (4,))}, "frame 'q' of layer 1: shape"),
        ({Key("q", 1): Spec(torch.float32, (2, 2)), Key("v", 5): Spec(torch.float32, (1,))}, "frame 'v' of layer 5: missing"),
    ],
)
async def test_what_does_not_fit_is_named(both: Ends, change: dict[Key, Spec], named: str) -> None:
    outlet, inlet = both.attach()
    with pytest.raises(Incompatible, match=named):
        await transfer(outlet, inlet, [(Key("q", 1), torch.ones(2, 2))], change)
    await inlet.close()
    await outlet.close()
    assert both.context._pairs.open == 0


@pytest.mark.parametrize("kind", [TransportKind.SHM])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"length": 1 << 40}, r"tensors\.length"),
        ({"length": -1}, r"tensors\.length"),
        ({"length": 64}, "'b' of layer 0: offset 64"),
        ({"offset": -ALIGNMENT}, "'a' of layer 0: offset"),
        ({"offset": 2}, "'a' of layer 0: offset"),
        ({"offset": 1 << 30}, "'a' of layer 0: offset"),
        ({"twice": True}, "'a' of layer 0: given twice"),
        ({"missing": True}, "'b' of layer 0: missing"),
        ({"place": 77}, r"tensors\.place"),
    ],
)
async def test_a_place_that_does_not_fit_is_named(both: Ends, change: dict[str, int], named: str) -> None:
    tensors = {Key("a", 0): torch.ones(4), Key("b", 0): torch.ones(4)}
    outlet, inlet = both.attach()
    (message,) = await messages(outlet, tensors.items())
    placed = message.state.tensors
    for field, value in change.items():
        if field == "offset":
            placed.tensors[0].offset = value
        elif field == "twice":
            placed.tensors.append(placed.tensors[0])
        elif field == "missing":
            del placed.tensors[1]
        else:
            setattr(placed, field, value)
    with pytest.raises(Incompatible, match=named):
        await inlet.receive(placed, spec_of(tensors), CPU, Stream().read)


@pytest.mark.parametrize("kind", [TransportKind.SHM])
async def test_more_bytes_than_a_segment_has(both: Ends) -> None:
    outlet, inlet = both.attach()
    (small,) = await messages(outlet, [(Key("a", 0), torch.ones(4))])
    large = {Key("a", 0): torch.ones(1_000_000)}
    (message,) = await messages(outlet, large.items())
    message.state.tensors.place = small.state.tensors.place
    with pytest.raises(Incompatible, match=r"tensors\.length: 4000000 in a segment of 1048576 bytes"):
        await inlet.receive(message.state.tensors, spec_of(large), CPU, Stream().read)


@pytest.mark.parametrize("kind", [TransportKind.DIST])
async def test_a_transfer_out_of_turn(both: Ends) -> None:
    tensors = {Key("x", 0): torch.ones(3)}
    outlet, inlet = both.attach()
    await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
    stream = Stream()
    sending = asyncio.create_task(send(outlet, tensors.items(), stream))
    message = await stream.read()
    assert message is not None
    message.state.tensors.place = 0
    with pytest.raises(Incompatible, match=r"tensors\.place: transfer 0 of the group, where 1 is due"):
        await inlet.receive(message.state.tensors, spec_of(tensors), CPU, stream.read)
    await inlet.close()
    with pytest.raises(Unavailable, match="process group"):
        await sending
    await outlet.close()


async def test_memory_is_not_to_be_had_where_frames_were_agreed() -> None:
    async with ends(TransportConfig(TransportKind.GRPC)) as both:
        _, inlet = both.attach()
        with pytest.raises(Incompatible, match="which takes frames only"):
            await inlet.receive(link_pb2.Placed(), {}, CPU, Stream().read)


@KINDS
async def test_another_message_in_the_middle_of_frames_names_what_is_missing(kind: TransportKind) -> None:
    """Frames stand in for every transport."""
    tensors = {Key("a", 0): torch.ones(MESSAGE_BYTES // 4), Key("b", 0): torch.ones(MESSAGE_BYTES // 8)}
    async with ends(TransportConfig(TransportKind.GRPC)) as frames, ends(TransportConfig(kind, timeout_s=10)) as both:
        announced, first, _ = await messages(frames.attach()[0], tensors.items())
        outlet, inlet = both.attach()
        await joined(outlet, inlet)
        stream = Stream()
        for message in (announced, first, announced):
            await stream.write(message)
        with pytest.raises(Incompatible, match="'b' of layer 0: missing"):
            await receive(inlet, stream, spec_of(tensors))
        await outlet.close()
        await inlet.close()


@KINDS
async def test_many_pairs_at_once(kind: TransportKind) -> None:
    """Three contexts, three workers, three links each, all sending at the same time."""
    config = TransportConfig(kind, timeout_s=30)
    async with ends(config) as a, ends(config) as b, ends(config) as c:
        contexts, workers = [a.context, b.context, c.context], [a.worker, b.worker, c.worker]
        tensors = [_tensors(seed) for seed in range(3)]

        async def link(i: int, context: int, worker: int) -> None:
            outlet, choice = contexts[context].attach(workers[worker].offer, WORKER_PEER)
            inlet = workers[worker].attach(choice, f"127.0.0.1:{context}")
            for _ in range(3):
                assert _arrived(await transfer(outlet, inlet, tensors[i].items(), spec_of(tensors[i])), tensors[i])
            await outlet.close()
            await inlet.close()

        await asyncio.gather(*(link(i, x, y) for i in range(3) for x in range(3) for y in range(3)))
        assert all(context._pairs.open == 0 for context in contexts)


def _native_threads() -> int:
    """Those that are torch's own."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


async def _settled_files() -> int:
    """Open files, once those that were closed are gone: torch opens and closes its sockets in threads of its own."""
    await until(lambda: not any(thread.name.startswith("group-") for thread in threading.enumerate()), 60)
    counts = [-1]
    while len(counts) < 6 or len(set(counts[-5:])) > 1:
        await asyncio.sleep(0.05)
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts[-1]


@KINDS
async def test_close_leaves_nothing(kind: TransportKind) -> None:
    before, files = sorted(os.listdir("/dev/shm")), await _settled_files()
    tensors = _tensors()
    async with ends(TransportConfig(kind, timeout_s=10)) as both:
        outlet, inlet = both.attach()
        await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
        if kind is TransportKind.SHM:
            assert mapped_segments() == 2  # one segment, at both ends
        del outlet, inlet
    await until(lambda: mapped_segments() == 0)  # a thread that copied may still be putting its work away
    assert sorted(os.listdir("/dev/shm")) == before
    if kind is not TransportKind.DIST:  # torch closes its sockets in threads of its own
        assert len(os.listdir("/proc/self/fd")) <= files


@KINDS
async def test_links_come_and_go_and_nothing_grows(kind: TransportKind) -> None:
    tensors = _tensors()
    async with ends(TransportConfig(kind, timeout_s=10)) as both:

        async def link() -> None:
            outlet, inlet = both.attach()
            assert both.context._pairs.open == (kind is TransportKind.DIST)
            await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
            await outlet.close()
            await inlet.close()
            assert both.context._pairs.open == 0
            if isinstance(inlet, DistInlet):
                assert inlet.group.broken  # the worker's part, too
                assert not inlet.group._spare

        await link()  # the context's store and the worker's connection stay
        files, threads, segments = await _settled_files(), _native_threads(), both.context._segments.used
        for _ in range(8):
            await link()
        assert await _settled_files() <= files
        assert both.context._segments.used == segments
        await until(lambda: _native_threads() <= threads)


@pytest.mark.parametrize("kind", [TransportKind.SHM])
async def test_segments_are_used_again(both: Ends) -> None:
    tensors = _tensors()
    for _ in range(3):
        outlet, inlet = both.attach()
        for _ in range(3):
            await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
        await outlet.close()
    assert mapped_segments() == 2


@pytest.mark.parametrize("kind", [TransportKind.DIST])
async def test_buffers_are_used_again(both: Ends) -> None:
    tensors = {Key("x", 0): torch.ones(1000)}
    outlet, inlet = both.attach()
    places = set()
    for _ in range(3):
        received = await arrive(outlet, inlet, tensors.items(), spec_of(tensors))
        places.add(received.tensors[Key("x", 0)].data_ptr())
        received.release()
    assert len(places) == 1


@pytest.mark.parametrize("kind", [TransportKind.SHM])
async def test_what_a_worker_still_reads_is_never_written_again(both: Ends) -> None:
    """Its link ends before it is released, and others send meanwhile."""
    first, second = {Key("x", 0): torch.full((1000,), 1.0)}, {Key("x", 0): torch.full((1000,), 2.0)}
    outlet, inlet = both.attach()
    held = await arrive(outlet, inlet, first.items(), spec_of(first))
    others = [both.attach() for _ in range(3)]
    await transfer(*others[0], second.items(), spec_of(second))  # while it is leased
    await transfer(outlet, inlet, second.items(), spec_of(second))  # on its own link, too
    await outlet.close()
    await inlet.close()
    await transfer(*others[1], second.items(), spec_of(second))  # and after it was dropped
    assert _arrived(held.tensors, first)
    held.release()  # late: it is nobody's any more
    await transfer(*others[2], second.items(), spec_of(second))
    assert _arrived(held.tensors, first)
    del held
    await asyncio.sleep(0)  # the worker's loop hears that it is dropped
    assert mapped_segments() == 2  # that of the others


@KINDS
async def test_several_transfers_are_held_at_once_and_released_in_any_order(both: Ends) -> None:
    """A worker's engine takes them between two forwards, however many have come by then."""
    outlet, inlet = both.attach()
    tensors = [_tensors(seed) for seed in range(4)]
    held = [await arrive(outlet, inlet, each.items(), spec_of(each)) for each in tensors]
    for i in (2, 0, 3):
        held[i].release()
    again = await arrive(outlet, inlet, tensors[0].items(), spec_of(tensors[0]))
    assert _arrived(held[1].tensors, tensors[1])
    assert _arrived(again.tensors, tensors[0])
    await inlet.close()
    await outlet.close()
    assert _arrived(again.tensors, tensors[0])  # good until it is released, even after the link's end
    for received in (held[1], again):
        received.release()


@pytest.mark.parametrize("kind", [TransportKind.SHM])
async def test_a_transfer_that_is_cancelled_leaves_its_segment_to_no_one(both: Ends) -> None:
    """Nobody knows whether the worker has been told of it."""
    tensors = {Key("x", 0): torch.ones(1000)}
    outlet, _ = both.attach()
    announced: list[int] = []

    async def write(message: link_pb2.ContextMessage) -> None:
        announced.append(message.state.tensors.place)
        await asyncio.Event().wait()

    sending = asyncio.create_task(outlet.send(list(tensors.items()), header, write))
    await until(lambda: announced)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    (message,) = await messages(outlet, tensors.items())
    assert message.state.tensors.place not in announced
    await outlet.close()
    assert both.context._segments.used == 0


async def test_beyond_its_memory_a_context_sends_frames() -> None:
    tensors = _tensors()  # needs a segment of 8 MiB
    config = TransportConfig(TransportKind.SHM, shm_bytes=12 << 20)
    async with ends(config) as both, ends(config) as other:
        outlet, inlet = both.attach()
        (header_,) = await messages(outlet, tensors.items())  # not read: it stays leased
        assert placed_in(header_) is not None
        outlet2, inlet2 = both.attach()
        assert _arrived(await transfer(outlet2, inlet2, tensors.items(), spec_of(tensors)), tensors)
        assert both.context._segments.used <= config.shm_bytes
        header_, *frames = await messages(outlet2, tensors.items())
        assert placed_in(header_) is None
        assert frames
        assert all(message.HasField("frames") for message in frames)
        await outlet.close()
        # now there is room, and another worker gets what the first no longer needs
        await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
        outlet3, _ = both.context.attach(other.worker.offer, WORKER_PEER)
        (header_,) = await messages(outlet3, tensors.items())
        assert placed_in(header_) is not None
        assert both.context._segments.used <= config.shm_bytes


async def test_every_link_has_a_group_of_its_own() -> None:
    """Made with it and dropped with it: one that breaks is nothing to the others."""
    tensors = _tensors()
    async with ends(TransportConfig(TransportKind.DIST, timeout_s=10)) as both:
        outlet, inlet = both.attach()
        other, other_inlet = both.attach()
        assert len({group.name for group in both.context._pairs._groups}) == both.context._pairs.open == 2
        await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
        stream = Stream()
        sending = asyncio.create_task(send(outlet, tensors.items(), stream))
        await stream.read()
        sending.cancel()  # announced, and never sent
        await asyncio.gather(sending, return_exceptions=True)
        with pytest.raises(Unavailable, match="process group"):
            await send(outlet, tensors.items(), stream)
        await outlet.close()
        assert both.context._pairs.open == 1
        assert _arrived(await transfer(other, other_inlet, tensors.items(), spec_of(tensors)), tensors)
        again, again_inlet = both.attach()
        assert _arrived(await transfer(again, again_inlet, tensors.items(), spec_of(tensors)), tensors)
        for end in (inlet, other, other_inlet, again, again_inlet):
            await end.close()
        assert both.context._pairs.open == 0


@pytest.mark.parametrize("kind", [TransportKind.DIST])
async def test_a_worker_that_stops_receiving_ends_the_group(both: Ends) -> None:
    tensors = {Key("ssm", 0): torch.ones(20_000_000)}
    outlet, inlet = both.attach()
    stream = Stream()
    sending = asyncio.create_task(send(outlet, tensors.items(), stream))
    message = await stream.read()
    assert message is not None
    receiving = asyncio.create_task(inlet.receive(placed_in(message), spec_of(tensors), CPU, stream.read))
    await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    await inlet.close()
    assert receiving.cancelled()
    async with asyncio.timeout(20):
        await asyncio.gather(sending, return_exceptions=True)  # it may have been through before
        with pytest.raises(Unavailable, match="process group"):
            await send(outlet, tensors.items(), stream)
    await outlet.close()


async def test_a_worker_that_never_comes_does_not_keep_a_context_waiting() -> None:
    async with ends(TransportConfig(TransportKind.DIST, timeout_s=0.5)) as both:
        outlet, _ = both.context.attach(both.worker.offer, WORKER_PEER)
        with pytest.raises(Unavailable, match="process group"):
            await asyncio.wait_for(messages(outlet, _tensors().items()), 20)
        await outlet.close()
        assert both.context._pairs.open == 0


async def test_a_backend_that_failed_with_a_worker_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is insisted on; and what is remembered of workers that came and went does not grow."""
    monkeypatch.setattr(pairs, "MAX_FAILED", 2)
    config = TransportConfig(timeout_s=0.2)
    async with ends(config, TransportConfig(TransportKind.DIST, timeout_s=10)) as both:
        offer = both.worker.offer
        for name in ("a", "b", "c"):
            offer.peer = name
            outlet, _ = both.context.attach(offer, WORKER_PEER)
            with pytest.raises(Unavailable):
                await asyncio.wait_for(messages(outlet, []), 20)
            assert not both.context._pairs.failed(name, "gloo")
            await outlet.close()
            assert both.context._pairs.failed(name, "gloo")
            with pytest.raises(Incompatible, match=r"transport\.backends: gloo failed between these two before"):
                both.context.attach(offer, WORKER_PEER)
        assert len(both.context._pairs._failed) == 2
        assert both.context._pairs.failed("b", "gloo")
        assert not both.context._pairs.failed("a", "gloo")


async def test_a_group_that_worked_and_broke_is_no_reason_against_the_next() -> None:
    tensors = {Key("x", 0): torch.ones(3)}
    async with ends(TransportConfig(timeout_s=10), TransportConfig(TransportKind.DIST, timeout_s=10)) as both:
        outlet, inlet = both.attach()
        await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
        await inlet.close()
        with pytest.raises(Unavailable):
            await messages(outlet, tensors.items())
        await outlet.close()
        assert not both.context._pairs.failed(both.worker.offer.peer, "gloo")
        assert _arrived(await transfer(*both.attach(), tensors.items(), spec_of(tensors)), tensors)
