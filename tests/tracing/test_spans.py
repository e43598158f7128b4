"""What a real stack records: every transfer, each in its place."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.checkpoints import write_tiny_checkpoint
from twotower.cli.main import main
from twotower.client.grpc_client import GatewayClient
from twotower.events import Finished
from twotower.launcher.config import on_free_ports
from twotower.launcher.stack import stack
from twotower.tracing.timeline import Span, read_spans

SESSIONS, BLOCKS = 3, 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spans of a few sessions at one time."""
    checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    directory = tmp_path_factory.mktemp("trace")

    async def one(client: GatewayClient, token: int, block_size: int) -> None:
        events = client.generate([token], max_tokens=BLOCKS * block_size, ignore_eos=True)
        *_, last = [event async for event in events]
        assert isinstance(last, Finished)
        assert last.blocks == BLOCKS

    async def work() -> None:
        config = on_free_ports(checkpoint, threads=1, trace=directory)
        async with stack(config, print) as running, GatewayClient(running.grpc_address) as client:
            block_size = (await client.model()).block_size
            await asyncio.gather(*(one(client, 5 + i, block_size) for i in range(SESSIONS)))

    asyncio.run(work())
    return directory


def test_every_transfer_is_recorded_in_its_place(directory: Path) -> None:
    spans = read_spans(directory)
    assert {span.name for span in spans if span.lane == "engine"} == {"prefill", "commit", "step", "apply"}
    sessions: dict[str, dict[str, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for span in spans:
        assert span.end_s >= span.start_s
        if span.lane == "wire":
            sessions[span.attributes["session"]][span.name].append(span)
    assert len(sessions) == SESSIONS
    for session in sessions.values():
        # The last block's delta is sent to nobody: the session is over.
        assert {name: len(own) for name, own in session.items()} == {
            "send state": 1,
            "receive state": 1,
            "send delta": BLOCKS - 1,
            "await delta": BLOCKS - 1,
        }
        (state,), (received,) = session["send state"], session["receive state"]
        assert state.start_s <= received.end_s
        assert received.attributes["bytes"] > 0
        for delta, awaited in zip(session["send delta"], session["await delta"], strict=True):
            assert awaited.attributes["bytes"] > 0
            assert received.end_s <= awaited.start_s <= delta.start_s <= awaited.end_s
            # Between handing a block in and its delta, the context commits it.
            assert any(s.name == "commit" and awaited.start_s <= s.start_s <= s.end_s <= delta.start_s for s in spans)


def test_the_picture(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "timeline.png"
    assert main(["trace", str(directory), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert all(name in told for name in ("await delta", "send state", "behind steps"))
