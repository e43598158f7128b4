"""`twotower generate`: one prompt, streamed to the terminal block by block, or as one JSON object."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twotower.cli.options import (
    DEFAULT_CHECKPOINT,
    DEFAULT_TARGET,
    add_experts,
    add_place,
    check_at_least_one,
    check_target,
    not_given,
)
from twotower.errors import InvalidArgument, Unavailable
from twotower.events import Accepted, Block, Event, Finished, Shown
from twotower.request import MAX_TIMEOUT_S, NO_DRAFT, Mode, Priority, TokenLogprob

DEFAULT_MAX_TOKENS = 256


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command."""
    parser = commands.add_parser("generate", help="continue a prompt", allow_abbrev=False)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text; - reads it from standard input")
    parser.add_argument("--prompt-ids", metavar='"1 2 3"', help="token ids in place of text")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--target", default=DEFAULT_TARGET, metavar="HOST:PORT", help=f"gateway (default {DEFAULT_TARGET})")
    where.add_argument("--local", action="store_true", help="both towers in this process, no services")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="with --local: checkpoint directory (default: the one that ships)"
    )
    parser.add_argument("--mode", default=Mode.DIFFUSION.value, choices=[mode.value for mode in Mode])
    parser.add_argument("--gamma", type=float, metavar="G", help="confidence that commits a position (default 0.8)")
    parser.add_argument("--block-size", type=int, metavar="L", help="tokens a block (default: the checkpoint's)")
    parser.add_argument(
        "--steps", type=int, metavar="T", help="most forwards a block (default: the block size; speculative: what drafts earn)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help=f"default {DEFAULT_MAX_TOKENS}")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default 0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest, of probability P together (default 1)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="default 0")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument(
        "--priority", default="normal", choices=[p.name.lower() for p in Priority], help="who goes first where requests wait"
    )
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: each token's log probability, and the N likeliest at its place"
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="give up after so many seconds (default: never)")
    parser.add_argument("--no-eos", action="store_true", help="go on to --max-tokens whatever is generated")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    add_place(parser)
    add_experts(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads, with --local")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Generate and print."""
    prompt = _prompt(args)
    if args.mode == Mode.MOCK_AR.value and not args.local:
        raise InvalidArgument("mode", "mock-ar exists only with --local")
    check_at_least_one(args, "threads")
    if args.timeout is not None and not 0 < args.timeout <= MAX_TIMEOUT_S:
        raise InvalidArgument("timeout", f"must be in (0, {MAX_TIMEOUT_S}] seconds, not {args.timeout:g}")
    if args.logprobs is not None and not args.json:
        raise InvalidArgument("logprobs", "are printed with --json only")
    if args.local and (args.timeout is not None or args.priority != "normal"):
        raise InvalidArgument("local", "nothing waits in one process: --timeout and --priority are for a gateway")
    if not args.local:
        shared = ("dtype", "device", "kernels", "experts", "context_experts")
        for name, unset in {"checkpoint": None, "threads": None, **{name: not_given(name) for name in shared}}.items():
            if getattr(args, name) != unset:
                print(
                    f"warning: --{name.replace('_', '-')} is for --local; the gateway serves its own model its own way",
                    file=sys.stderr,
                )
    check_target(args.target)
    result = _Result(stream=not args.json)
    try:
        if args.local:  # in no event loop, so that Ctrl-C ends it at once
            for event in _local(args, prompt):
                result.take(event)
        else:
            asyncio.run(_remote(args, prompt, result))
    finally:
        result.end_line()
    if args.json:
        print(json.dumps(result.as_json()))
    else:
        print(result.summary(), file=sys.stderr)


class _Result:
    """Collects the events of a generation, and shows text as it comes."""

    def __init__(self, *, stream: bool) -> None:
        self._stream = stream
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._warnings: tuple[str, ...] = ()
        self._end: Finished | None = None
        self._open_line = False

    def take(self, event: Event) -> None:
        if isinstance(event, Accepted):
            self._warnings = event.warnings
            for warning in event.warnings:
                print(f"warning: {warning}", file=sys.stderr)
            return
        if isinstance(event, Shown):
            return  # not asked for
        if isinstance(event, Block):
            self._token_ids += event.token_ids
            self._logprobs += event.logprobs
        else:
            self._end = event
        self._text.append(event.text)
        if self._stream and event.text:
            sys.stdout.write(event.text)
            sys.stdout.flush()
            self._open_line = True

    def end_line(self) -> None:
        """Leave the terminal at the start of a line, also when the generation broke off."""
        if self._open_line:
            print(flush=True)

    def as_json(self) -> dict[str, Any]:
        end = self._finished()
        return {
            "text": "".join(self._text),
            "token_ids": self._token_ids,
            "finish_reason": end.finish_reason.value,
            "forwards": end.forwards,
            "blocks": end.blocks,
            **({"rounds": end.rounds, **dataclasses.asdict(end.use)} if end.use != NO_DRAFT else {}),
            "seconds": round(end.seconds, 6),
            **({"logprobs": [_logprob_json(told) for told in self._logprobs]} if self._logprobs else {}),
            **({"warnings": list(self._warnings)} if self._warnings else {}),
        }

    def summary(self) -> str:
        end = self._finished()
        if end.use != NO_DRAFT:
            return f"{self._ids()}[{_speculative_summary(end)}]"
        rate = end.completion_tokens / end.forwards if end.forwards else 0.0
        return (
            f"{self._ids()}[{end.completion_tokens} tokens, {end.blocks} blocks, {end.forwards} forwards, "
            f"{rate:.2f} tokens a forward, {end.seconds:.2f} s, finish: {end.finish_reason.value}]"
        )

    def _ids(self) -> str:
        """What is shown where no text could be."""
        return "" if any(self._text) else f"token ids: {' '.join(map(str, self._token_ids))}\n"

    def _finished(self) -> Finished:
        if self._end is None:
            raise Unavailable("the generation broke off without an end")
        return self._end


def _speculative_summary(end: Finished) -> str:
    use = end.use
    each = f", {(use.accepted + end.rounds) / end.rounds:.2f} tokens a round" if end.rounds else ""
    return (
        f"{end.completion_tokens} tokens, {end.rounds} rounds{each}, {use.accepted} of {use.drafted} drafted tokens accepted, "
        f"{end.forwards} forwards of the denoiser and {use.context_forwards} of the context tower, "
        f"{end.seconds:.2f} s, finish: {end.finish_reason.value}"
    )


def _logprob_json(told: TokenLogprob) -> dict[str, Any]:
    """As gRPC's messages name it."""
    return {"logprob": told.logprob, "top": [{"token_id": token, "logprob": logprob} for token, logprob in told.top]}


def _prompt(args: argparse.Namespace) -> str | tuple[int, ...]:
    """The prompt as text or ids. Raises InvalidArgument."""
    if (args.prompt is None) == (args.prompt_ids is None):
        raise InvalidArgument("prompt", "give either PROMPT or --prompt-ids")
    if args.prompt_ids is not None:
        try:
            return tuple(int(word) for word in args.prompt_ids.replace(",", " ").split())
        except ValueError as error:
            raise InvalidArgument("prompt-ids", f"must be integers: {error}") from None
    if args.prompt != "-":
        return str(args.prompt)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidArgument("prompt", f"standard input is no UTF-8 text: {error}") from None


async def _remote(args: argparse.Namespace, prompt: str | tuple[int, ...], result: _Result) -> None:
    """Let `result` take the events of a gateway."""
    from twotower.client.grpc_client import GatewayClient

    async with GatewayClient(args.target) as client:
        events = client.generate(
            prompt,
            mode=Mode(args.mode),
            max_tokens=args.max_tokens,
            block_size=args.block_size,
            steps=args.steps,
            gamma=args.gamma,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            priority=Priority[args.priority.upper()],
            timeout_s=args.timeout,
            logprobs=args.logprobs,
            seed=args.seed,
            stop=args.stop,
            ignore_eos=args.no_eos,
        )
        try:
            async for event in events:
                result.take(event)
        except Unavailable as error:
            if str(error).startswith("no gateway answers"):
                raise Unavailable(f"{error}; start one with `twotower up`, or use --local") from None
            raise


def _local(args: argparse.Namespace, prompt: str | tuple[int, ...]) -> Iterator[Event]:
    """The same events, from both towers in this process."""
    from twotower.cli.local import generate
    from twotower.gateway.request import Request

    request = Request(
        prompt=prompt,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        mode=Mode(args.mode),
        max_tokens=args.max_tokens,
        block_size=args.block_size,
        steps=args.steps,
        gamma=args.gamma,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
        ignore_eos=args.no_eos,
        logprobs=args.logprobs,
    )
    return generate(
        args.checkpoint or DEFAULT_CHECKPOINT,
        request,
        dtype=args.dtype,
        device=args.device,
        kernels=args.kernels,
        threads=args.threads,
        experts=args.experts,
        context_experts=args.context_experts,
    )
