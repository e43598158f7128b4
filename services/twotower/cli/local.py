"""A request to both towers in this process, as the events a gateway would send."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from twotower.engine.local import LocalEngine
from twotower.events import Accepted, Block, Event, Finished
from twotower.gateway.preparation import Preparation, text_stream
from twotower.gateway.request import Request
from twotower.model.checkpoint import Checkpoint
from twotower.request import NO_DRAFT, FinishReason
from twotower.text.tokenizer import Tokenizer


def generate(
    checkpoint: Path,
    request: Request,
    *,
    dtype: str,
    device: str,
    kernels: str,
    threads: int | None,
    experts: str = "auto",
    context_experts: str | None = None,
) -> Iterator[Event]:
    """Check the request against the checkpoint's headers, then load both towers and generate. Raises TwoTowerError."""
    headers = Checkpoint.open(checkpoint)
    tokenizer = Tokenizer.load(headers.tokenizer_path) if headers.tokenizer_path is not None else None
    checked = Preparation(tokenizer, headers.limits).check(request)
    text = text_stream(tokenizer, headers.limits, request.stop)
    engine = LocalEngine(
        checkpoint,
        dtype=dtype,
        device=device,
        kernels=kernels,
        threads=threads,
        experts=experts,
        context_experts=context_experts,
    )
    yield Accepted("local", len(checked.prompt), checked.warnings)
    started = time.perf_counter()
    tokens = forwards = blocks = rounds = 0
    use = NO_DRAFT
    reason = FinishReason.LENGTH
    for written in engine.blocks(checked.prompt, checked.params):
        piece = text.push(written.token_ids) if text else ""
        yield Block(blocks, tuple(written.token_ids), piece, written.forwards, written.logprobs, written.use)
        use, rounds = use + written.use, rounds + (written.use.drafted > 0)
        tokens, forwards, blocks = tokens + len(written.token_ids), forwards + written.forwards, blocks + 1
        stopped = text is not None and text.stopped
        reason = FinishReason.STOP if stopped else written.finish_reason or reason
        if stopped:
            break
    rest = text.finish() if text else ""
    yield Finished(reason, tokens, forwards, blocks, time.perf_counter() - started, rest, rounds, use)
