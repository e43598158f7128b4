"""Copies of states use the same memory again, and never memory that is still read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twotower.context.copies import CopyBuffers
from twotower.wire.frames import Key


def _state(tokens: int, value: float) -> list[tuple[Key, Tensor]]:
    return [(Key("ssm", 0), torch.full((4, 8), value)), (Key("k", 1), torch.full((2, tokens, 16), value, dtype=torch.bfloat16))]


def test_a_copy_holds_until_it_is_given_back() -> None:
    buffers = CopyBuffers(2)
    first, second = buffers.copy(_state(10, 1.0)), buffers.copy(_state(10, 2.0))
    assert not buffers.available
    buffers.give_back(first)
    third = buffers.copy(_state(9, 3.0))  # a shorter one fits the buffer
    assert third.buffer is first.buffer
    for copy, tokens, value in ((second, 10, 2.0), (third, 9, 3.0)):
        for (_, expected), tensor in zip(_state(tokens, value), copy.tensors.values(), strict=True):
            assert tensor.equal(expected)


def test_too_small_buffers_make_room() -> None:
    buffers = CopyBuffers(1)
    buffers.give_back(small := buffers.copy(_state(10, 1.0)))
    buffers.give_back(large := buffers.copy(_state(1000, 2.0)))
    assert large.buffer.numel() > small.buffer.numel()
    assert buffers.copy(_state(10, 3.0)).buffer is large.buffer  # the only one that is kept


def test_memory_that_is_not_there_costs_no_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = CopyBuffers(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            buffers.copy(_state(10, 1.0))
    assert buffers.available
