"""Tensors over the wire: the same bits come out, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.engine.context_engine import ContextEngine
from twotower.errors import Incompatible
from twotower.model.checkpoint import Checkpoint
from twotower.model.state import ContextState
from twotower.model.weights import load_context_tower
from twotower.request import GenerationParams
from twotower.internal.v1 import tensor_pb2
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
        assembler.add(tensor_pb2.FrameBatch.FromString(message.SerializeToString()))
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
    ],
)
def test_a_frame_that_does_not_fit(changes: dict[str, object], named: str) -> None:
    assembler = FrameAssembler({Key("k", 1): Spec(torch.float32, (2, 2))})
    with pytest.raises(Incompatible, match=named):
        assembler.add(_frame(**changes))


def test_missing_and_incomplete() -> None:
    assembler = FrameAssembler({Key("k", 1): Spec(torch.float32, (2, 2))})
    with pytest.raises(Incompatible, match="'k' of layer 1: missing"):
        assembler.finish(CPU)
    assembler.add(_frame(data=bytes(12)))
    with pytest.raises(Incompatible, match="12 bytes, expected 16"):
        assembler.finish(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_worker_follows_the_context_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """A snapshot, then twelve blocks by deltas: at every border both hold the same bits."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint(tmp_path))
    config = checkpoint.config
    engine = ContextEngine(load_context_tower(checkpoint, dtype, CPU))
    session = engine.open("test", [5, 6, 7], GenerationParams())
    engine.prefill(session, 3)

    assembler = FrameAssembler(state_spec(config, dtype, session.state.length))
    for batch in to_frames(state_tensors(session.state, engine.decay_rates)):
        assembler.add(batch)
    copy = ContextState.alone(config, dtype, CPU)
    rates = fill_state(copy, assembler.finish(CPU), session.state.length)
    g = torch.Generator().manual_seed(0)
    for _ in range(12):
        theirs = dict(state_tensors(copy, rates))
        for key, tensor in state_tensors(session.state, engine.decay_rates):
            assert torch.equal(tensor, theirs[key]), key
        block = torch.randint(0, 96, (16,), generator=g).tolist()
        (delta,) = engine.commit([(session, block)])
        assembler = FrameAssembler(delta_spec(config, dtype, 16))
        for batch in to_frames(delta_tensors(delta)):
            assembler.add(batch)
        copy.apply(delta_from(assembler.finish(CPU), config, 16), rates)
    assert copy.length == session.state.length == 3 + 12 * 16


def test_an_incompatible_pair_names_the_field() -> None:
    check_hello(make_hello("abc", torch.float32, "w", "s", 1), "abc", torch.float32)
    for hello, field in (
        (make_hello("abd", torch.float32, "w", "s", 1), "checkpoint_id"),
        (make_hello("abc", torch.bfloat16, "w", "s", 1), "dtype"),
    ):
        with pytest.raises(Incompatible, match=field):
            check_hello(hello, "abc", torch.float32)
    hello = make_hello("abc", torch.float32, "w", "s", 1)
    hello.schema_version += 1
    with pytest.raises(Incompatible, match="schema_version"):
        check_hello(hello, "abc", torch.float32)
