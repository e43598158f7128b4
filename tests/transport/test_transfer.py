"""What every transport must do: the same bits come out, what does not fit is named, and nothing stays behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.transports import CPU, Ends, ends, mapped_segments, same_bits, sent, spec_of, transfer
from twotower.engine.context_engine import ContextEngine
from twotower.errors import Incompatible, Unavailable
from twotower.model.checkpoint import Checkpoint
from twotower.model.state import ContextState
from twotower.model.weights import load_context_tower
from twotower.request import GenerationParams
from twotower.transport.config import Kind, TransportConfig
from twotower.transport.layout import ALIGNMENT
from twotower.internal.v1 import context_pb2
from twotower.wire.frames import Key, Spec
from twotower.wire.state import delta_from, delta_spec, delta_tensors, fill_state, state_spec, state_tensors

KINDS = pytest.mark.parametrize("kind", list(Kind))
PLACED = pytest.mark.parametrize("kind", [Kind.SHM, Kind.DIST])


@pytest.fixture
async def both(kind: Kind) -> AsyncIterator[Ends]:
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


def _arrived(got: dict[Key, Tensor], sent_: dict[Key, Tensor]) -> bool:
    return got.keys() == sent_.keys() and all(same_bits(got[key], sent_[key]) for key in sent_)


@KINDS
async def test_all_sizes_and_layouts_arrive_bit_for_bit(both: Ends) -> None:
    outlet, inlet = both.attach()
    for seed in range(3):
        tensors = _tensors(seed)
        assert _arrived(await transfer(outlet, inlet, tensors.items(), spec_of(tensors)), tensors)
    nothing = {Key("none", 0): torch.empty(0, 3)}
    assert _arrived(await transfer(outlet, inlet, nothing.items(), spec_of(nothing)), nothing)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [[5], [5, 6, 7]])
async def test_a_worker_follows_the_context(tmp_path: Path, both: Ends, dtype: torch.dtype, prompt: list[int]) -> None:
    """A snapshot, then blocks by deltas: at every border both hold the same bits."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path))
    config = checkpoint.config
    engine = ContextEngine(load_context_tower(checkpoint, dtype, CPU))
    state = ContextState.alone(config, dtype, CPU)
    session = engine.open("test", prompt, GenerationParams(), state=state)
    copy = ContextState.alone(config, dtype, CPU)
    outlet, inlet = both.attach()

    empty = await transfer(outlet, inlet, state_tensors(state, engine.decay_rates), state_spec(config, dtype, 0))
    assert all(tensor.numel() == 0 for key, tensor in empty.items() if key.name in "kv")  # before the first token

    engine.prefill(session, len(prompt))
    length = state.length
    tensors = await transfer(outlet, inlet, state_tensors(state, engine.decay_rates), state_spec(config, dtype, length))
    rates = fill_state(copy, tensors, length)
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        theirs = dict(state_tensors(copy, rates))
        assert all(same_bits(tensor, theirs[key]) for key, tensor in state_tensors(state, engine.decay_rates))
        (delta,) = engine.commit([(session, torch.randint(0, 96, (16,), generator=g).tolist())])
        tensors = await transfer(outlet, inlet, list(delta_tensors(delta)), delta_spec(config, dtype, 16))
        copy.apply(delta_from(tensors, config, 16), rates)
    assert copy.length == state.length == len(prompt) + 4 * 16


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


@pytest.mark.parametrize("kind", [Kind.SHM])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"length": 1 << 40}, "placed.length"),
        ({"length": -1}, "placed.length"),
        ({"length": 64}, "'b' of layer 0: offset 64"),
        ({"offset": -ALIGNMENT}, "'a' of layer 0: offset"),
        ({"offset": 2}, "'a' of layer 0: offset"),
        ({"offset": 1 << 30}, "'a' of layer 0: offset"),
        ({"twice": True}, "'a' of layer 0: given twice"),
        ({"place": 77}, "placed.place"),
    ],
)
async def test_a_place_that_does_not_fit_is_named(both: Ends, change: dict[str, int], named: str) -> None:
    tensors = {Key("a", 0): torch.ones(4), Key("b", 0): torch.ones(4)}
    outlet, inlet = both.attach()
    (message,) = [message async for message in sent(outlet, tensors.items())]
    for field, value in change.items():
        if field == "offset":
            message.placed.tensors[0].offset = value
        elif field == "twice":
            message.placed.tensors.append(message.placed.tensors[0])
        else:
            setattr(message.placed, field, value)
    with pytest.raises(Incompatible, match=named):
        await inlet.expect(spec_of(tensors), CPU).add(message)


async def test_memory_is_not_to_be_had_where_frames_were_agreed() -> None:
    async with ends(TransportConfig(Kind.GRPC)) as both:
        _, inlet = both.attach()
        with pytest.raises(Incompatible, match="which takes frames only"):
            await inlet.expect({}, CPU).add(context_pb2.ContextMessage(placed=context_pb2.Placed()))


@KINDS
async def test_many_pairs_at_once(kind: Kind) -> None:
    """Three contexts, three workers, three attachments each, all sending at the same time."""
    config = TransportConfig(kind, timeout_s=20)
    async with ends(config) as a, ends(config) as b, ends(config) as c:
        contexts, workers = [a.context, b.context, c.context], [a.worker, b.worker, c.worker]
        tensors = [_tensors(seed) for seed in range(3)]

        async def attachment(i: int, context: int, worker: int) -> None:
            outlet, choice = contexts[context].attach(workers[worker].offer, "ipv4:127.0.0.1:1")
            inlet = workers[worker].attach(choice, f"127.0.0.1:{context}")
            for _ in range(3):
                assert _arrived(await transfer(outlet, inlet, tensors[i].items(), spec_of(tensors[i])), tensors[i])
            await outlet.close()
            await inlet.close()

        await asyncio.gather(*(attachment(i, x, y) for i in range(3) for x in range(3) for y in range(3)))


async def _settled_files() -> int:
    """Open files, once those of the tests before are closed: torch closes its sockets in threads of its own."""
    counts = [-1]
    while len(counts) < 6 or len(set(counts[-5:])) > 1:
        await asyncio.sleep(0.05)
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts[-1]


@KINDS
async def test_close_leaves_nothing(kind: Kind) -> None:
    before, files = sorted(os.listdir("/dev/shm")), await _settled_files()
    tensors = _tensors()
    async with ends(TransportConfig(kind, timeout_s=10)) as both:
        outlet, inlet = both.attach()
        await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
        if kind is Kind.SHM:
            assert mapped_segments() == 2  # one segment, at both ends
        del outlet, inlet
    assert mapped_segments() == 0
    assert sorted(os.listdir("/dev/shm")) == before
    if kind is not Kind.DIST:  # torch closes its sockets in threads of its own
        assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("kind", [Kind.SHM])
async def test_segments_are_used_again(both: Ends) -> None:
    tensors = _tensors()
    for _ in range(3):
        outlet, inlet = both.attach()
        for _ in range(3):
            await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
        await outlet.close()
    assert mapped_segments() == 2


@pytest.mark.parametrize("kind", [Kind.SHM])
async def test_what_a_worker_still_reads_is_never_written_again(both: Ends) -> None:
    """Its attachment ends without an acknowledgement, and others send meanwhile."""
    first, second = {Key("x", 0): torch.full((1000,), 1.0)}, {Key("x", 0): torch.full((1000,), 2.0)}
    outlet, inlet = both.attach()
    (message,) = [message async for message in sent(outlet, first.items())]
    arrival = inlet.expect(spec_of(first), CPU)
    await arrival.add(message)
    held = await arrival.tensors()
    others = [both.attach() for _ in range(2)]
    await transfer(*others[0], second.items(), spec_of(second))  # while it is leased
    await outlet.close()
    await transfer(*others[1], second.items(), spec_of(second))  # and after it was dropped
    assert same_bits(held[Key("x", 0)], first[Key("x", 0)])
    del held, arrival
    await asyncio.sleep(0)  # the worker's loop hears that it is dropped
    assert mapped_segments() == 2  # that of the others


async def test_beyond_its_memory_a_context_sends_frames() -> None:
    tensors = _tensors()  # needs a segment of 8 MiB
    config = TransportConfig(Kind.SHM, shm_bytes=12 << 20)
    async with ends(config) as both, ends(config) as other:
        outlet, inlet = both.attach()
        async for message in sent(outlet, tensors.items()):  # not read: it stays leased
            assert message.HasField("placed")
        outlet2, inlet2 = both.attach()
        assert _arrived(await transfer(outlet2, inlet2, tensors.items(), spec_of(tensors)), tensors)
        assert both.context._segments.used <= config.shm_bytes
        async for message in sent(outlet2, tensors.items()):
            assert message.HasField("frames")
        await outlet.close()
        # now there is room, and another worker gets what the first no longer needs
        await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
        outlet3, _ = both.context.attach(other.worker.offer, "ipv4:127.0.0.1:1")
        async for message in sent(outlet3, tensors.items()):
            assert message.HasField("placed")
        assert both.context._segments.used <= config.shm_bytes


async def test_a_group_outlives_its_last_session_for_a_while() -> None:
    tensors = {Key("x", 0): torch.ones(3)}
    async with ends(TransportConfig(Kind.DIST, idle_s=0.01, timeout_s=10)) as both:
        names = []
        for _ in range(2):
            outlet, inlet = both.attach()
            (pair,) = both.context._pairs._pairs.values()
            names.append(pair.group.name)
            await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
            await outlet.close()
            async with asyncio.timeout(10):
                while both.context._pairs._pairs:  # noqa: ASYNC110  # a timer has no event
                    await asyncio.sleep(0.01)
        assert names[0] != names[1]


async def test_a_transfer_that_is_left_half_done_ends_its_group_and_the_next_attachment_makes_another() -> None:
    tensors = _tensors()
    async with ends(TransportConfig(Kind.DIST, timeout_s=10)) as both:
        outlet, inlet = both.attach()
        other, _ = both.attach()
        await transfer(outlet, inlet, tensors.items(), spec_of(tensors))
        messages = sent(outlet, tensors.items())
        await anext(messages)
        await messages.aclose()  # announced, and never sent
        with pytest.raises(Unavailable, match="process group"):
            await anext(sent(other, tensors.items()))
        outlet, inlet = both.attach()
        assert _arrived(await transfer(outlet, inlet, tensors.items(), spec_of(tensors)), tensors)


async def test_a_worker_that_never_comes_does_not_keep_a_context_waiting() -> None:
    async with ends(TransportConfig(Kind.DIST, timeout_s=0.5)) as both:
        outlet, _ = both.context.attach(both.worker.offer, "ipv4:127.0.0.1:1")
        with pytest.raises(Unavailable, match="process group"):
            await asyncio.wait_for(anext(sent(outlet, _tensors().items())), 20)
