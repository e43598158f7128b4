"""Tensors over the wire: the same bits come out, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.engine.context_engine import ContextEngine
from twotower.errors import Incompatible
from twotower.internal.v1 import link_pb2, tensor_pb2
from twotower.model.checkpoint import Checkpoint
from twotower.model.delta_batch import DeltaBatch, apply_batch
from twotower.model.state import ContextState
from twotower.model.weights import load_context_tower
from twotower.request import GenerationParams
from twotower.wire.frames import MESSAGE_BYTES, FrameAssembler, Key, Spec, to_frames
from twotower.wire.handshake import check_hello, make_hello
from twotower.wire.state import delta_from, delta_spec, delta_tensors, fill_state, state_spec, state_tensors

CPU = torch.device("cpu")


def test_large_and_small_tensors() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        Key("big", 0): torch.randn(3, 500_000, generator=g),  # 6 MB: three messages and more
        Key("small", 1): torch.randn(5, generator=g).bfloat16(),
        Key("none", 2): torch.empty(2, 0, 4),
        Key("strided", 3): torch.randn(6, 8, generator=g).t(),
    }
    assembler = FrameAssembler({key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()})
    messages = list(to_frames(tensors.items()))
    assert all(message.ByteSize() < MESSAGE_BYTES + 1000 for message in messages)
    for message in messages:
        assert not assembler.complete
        assembler.add(tensor_pb2.FrameBatch.FromString(message.SerializeToString()))
    assert assembler.complete
    for key, tensor in assembler.finish(CPU).items():
        assert torch.equal(tensor, tensors[key])


def _frame(**changes: object) -> tensor_pb2.FrameBatch:
    fields = {"name": "k", "layer": 1, "dtype": tensor_pb2.DTYPE_FLOAT32, "shape": [2, 2], "offset": 0, "data": bytes(16)}
    return tensor_pb2.FrameBatch(frames=[tensor_pb2.Frame(**{**fields, **changes})])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "q"}, "'q' of layer 1: not expected"),
        ({"layer": 2}, "layer 2: not expected"),
        ({"dtype": tensor_pb2.DTYPE_BFLOAT16}, "dtype"),
        ({"dtype": 77}, "dtype"),
        ({"shape": [4]}, "shape"),
        ({"shape": [2, -2]}, "shape"),
        ({"offset": 4}, "offset"),
        ({"data": bytes(17)}, "more than 16 bytes"),
        ({"data": b""}, "a piece without data"),
    ],
)
def test_a_frame_that_does_not_fit(changes: dict[str, object], named: str) -> None:
    assembler = FrameAssembler({Key("k", 1): Spec(torch.float32, (2, 2))})
    with pytest.raises(Incompatible, match=named):
        assembler.add(_frame(**changes))


def test_missing_and_incomplete() -> None:
    assembler = FrameAssembler({Key("k", 1): Spec(torch.float32, (2, 2))})
    for look in (assembler.check, lambda: assembler.finish(CPU)):
        with pytest.raises(Incompatible, match="'k' of layer 1: missing"):
            look()
    assembler.add(_frame(data=bytes(12)))
    for look in (assembler.check, lambda: assembler.finish(CPU)):
        with pytest.raises(Incompatible, match="12 bytes, expected 16"):
            look()
    assert not assembler.complete
    with pytest.raises(Incompatible, match="a piece without data"):
        assembler.add(_frame(offset=12, data=b""))
    assembler.add(_frame(offset=12, data=bytes(4)))
    assembler.check()
    assert assembler.complete


def test_a_tensor_without_elements_comes_once() -> None:
    """It has a frame of its own, so that what is complete is known."""
    assembler = FrameAssembler({Key("k", 1): Spec(torch.float32, (2, 0))})
    assert not assembler.complete
    empty = _frame(shape=[2, 0], data=b"")
    assembler.add(empty)
    assert assembler.complete
    assert assembler.finish(CPU)[Key("k", 1)].shape == (2, 0)
    with pytest.raises(Incompatible, match="a piece without data"):
        assembler.add(empty)
    assert FrameAssembler({}).complete


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_worker_follows_the_context_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """A snapshot, then twelve blocks by deltas, of three sessions in one batch: at every border both hold the same bits."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path))
    config = checkpoint.config
    engine = ContextEngine(load_context_tower(checkpoint, dtype, CPU))
    sessions = [engine.open(f"test {i}", [5, 6, 7][i:], GenerationParams()) for i in range(3)]
    copies = [ContextState.alone(config, dtype, CPU) for _ in sessions]
    for session, copy in zip(sessions, copies, strict=True):
        engine.prefill(session, 3)
        assembler = FrameAssembler(state_spec(config, dtype, session.state.length))
        for frames in to_frames(state_tensors(session.state, engine.decay_rates)):
            assembler.add(frames)
        rates = fill_state(copy, assembler.finish(CPU), session.state.length)
    g = torch.Generator().manual_seed(0)
    for _ in range(12):
        for session, copy in zip(sessions, copies, strict=True):
            theirs = dict(state_tensors(copy, rates))
            for key, tensor in state_tensors(session.state, engine.decay_rates):
                assert torch.equal(tensor, theirs[key]), key
        blocks = torch.randint(0, 96, (3, 16), generator=g).tolist()
        deltas = engine.commit_together(list(zip(sessions, blocks, strict=True)))
        assembler = FrameAssembler(delta_spec(config, dtype, 3, 16))
        for frames in to_frames(delta_tensors(deltas)):
            assembler.add(frames)
        apply_batch(copies, delta_from(assembler.finish(CPU), config, 16), rates)
    assert [copy.length for copy in copies] == [session.state.length for session in sessions]
    assert [copy.length for copy in copies] == [3 + 12 * 16, 2 + 12 * 16, 1 + 12 * 16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_those_of_the_spec_in_its_order(tmp_path: Path, dtype: torch.dtype) -> None:
    """So that a transfer in the usual layout is known by one comparison."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path))
    config = checkpoint.config
    engine = ContextEngine(load_context_tower(checkpoint, dtype, CPU))
    sessions = [engine.open(f"test {i}", [5, 6, 7], GenerationParams()) for i in range(2)]
    for session in sessions:
        engine.prefill(session, 3)
    named = list(state_tensors(sessions[0].state, engine.decay_rates))
    assert [(key, Spec(tensor.dtype, tuple(tensor.shape))) for key, tensor in named] == [*state_spec(config, dtype, 3).items()]
    deltas: DeltaBatch = engine.commit_together([(session, [5] * 7) for session in sessions])
    named = delta_tensors(deltas)
    assert [(key, Spec(tensor.dtype, tuple(tensor.shape))) for key, tensor in named] == [
        *delta_spec(config, dtype, 2, 7).items()
    ]


def test_an_incompatible_pair_names_the_field() -> None:
    check_hello(make_hello("abc", torch.float32, "w"), "abc", torch.float32)
    for hello, field in (
        (make_hello("abd", torch.float32, "w"), "checkpoint_id"),
        (make_hello("abc", torch.bfloat16, "w"), "dtype"),
    ):
        with pytest.raises(Incompatible, match=field):
            check_hello(hello, "abc", torch.float32)
    hello = make_hello("abc", torch.float32, "w")
    hello.schema_version += 1
    with pytest.raises(Incompatible, match="schema_version"):
        check_hello(hello, "abc", torch.float32)


def test_a_hello_carries_the_workers_name_and_offer() -> None:
    offer = link_pb2.TransportOffer(kinds=[link_pb2.TRANSPORT_SHM], peer="p")
    hello = make_hello("abc", torch.float32, "w", offer)
    assert (hello.worker_id, hello.transport) == ("w", offer)
    assert not make_hello("abc", torch.float32, "w").HasField("transport")
