"""Blocks on their way as messages, and back."""

from __future__ import annotations

from twotower.request import BlockStep
from twotower.v1 import inference_pb2


def step_to_pb(step: BlockStep, block: int = 0) -> inference_pb2.Step:
    """For the wire."""
    return inference_pb2.Step(
        block=block, number=step.number, token_ids=step.token_ids, committed=step.committed, confidence=step.confidence
    )


def step_from_pb(message: inference_pb2.Step) -> BlockStep:
    """From the wire; unchecked."""
    return BlockStep(message.number, tuple(message.token_ids), tuple(message.committed), tuple(message.confidence))


def step_fits(message: inference_pb2.Step, block_size: int, vocab_size: int) -> bool:
    """Whether the message holds a block of that size."""
    sizes = {len(message.token_ids), len(message.committed), len(message.confidence)}
    return sizes == {block_size} and all(0 <= token < vocab_size for token in message.token_ids)
