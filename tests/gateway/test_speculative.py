"""Speculative mode at the gateway: what it tells of rounds, and what the next context learns of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.gateways import gateway, replica
from tests.support.scripted_context import ScriptedContext
from twotower.errors import InvalidArgument, Unavailable
from twotower.events import Accepted, Block, Finished
from twotower.internal.v1 import context_pb2
from twotower.request import DraftUse, Mode
from twotower.v1 import inference_pb2

SCRIPT = list(range(10, 32))
ROUNDS = (3, 0, 1, 4, 4, 4, 4)
"""After the first token: 0 is an AR step."""


class SpeculativeContext(ScriptedContext):
    """Writes SCRIPT by rounds, and breaks off after so many of them."""

    def __init__(self, rounds: Sequence[int] = ROUNDS, breaks_after: int | None = None) -> None:
        super().__init__(SCRIPT)
        self.rounds = rounds[:breaks_after]
        self.breaks = breaks_after is not None

    async def Open(self, request: context_pb2.OpenRequest, context: Any) -> AsyncIterator[context_pb2.SessionEvent]:
        self.opened.append(request)
        at = request.generated
        if not at:
            yield context_pb2.SessionEvent(block=context_pb2.SessionBlock(token_ids=SCRIPT[:1]))
            at = 1
        for kept in self.rounds:
            use = inference_pb2.DraftUse(drafted=3 if kept else 0, accepted=max(kept - 1, 0), context_forwards=1)
            tokens = SCRIPT[at : at + max(kept, 1)]
            at += len(tokens)
            block = context_pb2.SessionBlock(token_ids=tokens, forwards=2 if kept else 0, draft=use)
            yield context_pb2.SessionEvent(block=block)
        if self.breaks:
            raise Unavailable("this context has had enough")
        reason = inference_pb2.FINISH_REASON_LENGTH
        yield context_pb2.SessionEvent(end=context_pb2.SessionEnd(finish_reason=reason))


TOTAL = DraftUse(drafted=18, accepted=14, context_forwards=7)


async def test_events_and_totals(checkpoint: Path) -> None:
    async with gateway(checkpoint, SpeculativeContext()) as running, running.client() as client:
        events = [e async for e in client.generate([5], mode=Mode.SPECULATIVE, max_tokens=22)]
    blocks = [event for event in events if isinstance(event, Block)]
    assert isinstance(events[0], Accepted)
    assert [token for block in blocks for token in block.token_ids] == SCRIPT
    assert [block.use.context_forwards for block in blocks] == [0, 1, 1, 1, 1, 1, 1, 1]
    assert blocks[1].use == DraftUse(3, 2, 1)
    end = events[-1]
    assert isinstance(end, Finished)
    assert (end.rounds, end.use, end.forwards) == (6, TOTAL, 12)


async def test_http_usage_and_metrics(checkpoint: Path) -> None:
    async with gateway(checkpoint, SpeculativeContext()) as running, httpx.AsyncClient(timeout=20, trust_env=False) as client:
        body = {"prompt": [5], "mode": "speculative", "max_tokens": 22}
        usage = (await client.post(f"{running.http}/v1/completions", json=body)).json()["usage"]
        metrics = (await client.get(f"{running.http}/metrics")).text
    assert usage == {
        "prompt_tokens": 1,
        "completion_tokens": 22,
        "total_tokens": 23,
        "forwards": 12,
        "blocks": 8,
        "tokens_per_forward": 1.833,
        "rounds": 6,
        "context_forwards": 7,
        "completion_tokens_details": {"accepted_prediction_tokens": 14, "rejected_prediction_tokens": 4},
    }
    for line in (
        'twotower_gateway_drafted_tokens_total{position="3"} 6.0',
        'twotower_gateway_accepted_tokens_total{position="1"} 5.0',
        'twotower_gateway_accepted_tokens_total{position="3"} 4.0',
        "twotower_gateway_round_tokens_count 6.0",
        "twotower_gateway_round_tokens_sum 20.0",
        "twotower_gateway_context_forwards_total 7.0",
    ):
        assert line in metrics.splitlines()


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_the_next_context_learns_of_the_rounds(checkpoint: Path, after: int) -> None:
    leaving, other = SpeculativeContext(breaks_after=after), SpeculativeContext(ROUNDS[after:])
    async with gateway(checkpoint, leaving) as running, running.client() as client:
        running.replicas.contexts.append(replica("context", "other", await other.start(), load=5))
        blocks = [e async for e in client.generate([5], mode=Mode.SPECULATIVE, max_tokens=22) if isinstance(e, Block)]
    await other.stop()
    assert [token for block in blocks for token in block.token_ids] == SCRIPT
    (request,) = other.opened
    assert tuple(request.rounds) == ROUNDS[:after]
    assert request.generated == 1 + sum(max(kept, 1) for kept in ROUNDS[:after])


@pytest.mark.parametrize(
    ("settings", "steps", "gamma"),
    [
        ({}, 0, 0.8),
        ({"steps": 3}, 3, 0.8),
        ({"gamma": 0.5}, 4, 0.5),
        ({"steps": 0}, 0, 0.8),
        ({"steps": 2, "gamma": 1.0}, 2, 1.0),
    ],
)
async def test_the_effort_of_a_draft_is_fixed_where_the_request_says_so(
    checkpoint: Path, settings: dict[str, Any], steps: int, gamma: float
) -> None:
    context = SpeculativeContext()
    async with gateway(checkpoint, context) as running, running.client() as client:
        async for _ in client.generate([5], mode=Mode.SPECULATIVE, max_tokens=22, **settings):
            pass
    params = context.opened[0].params
    assert (params.mode, params.steps, params.gamma) == (inference_pb2.MODE_SPECULATIVE, steps, gamma)


async def test_a_block_of_one_token_is_no_draft(checkpoint: Path) -> None:
    async with gateway(checkpoint, SpeculativeContext()) as running, running.client() as client:
        with pytest.raises(InvalidArgument, match="block_size"):
            async for _ in client.generate([5], mode=Mode.SPECULATIVE, block_size=1):
                pass
