"""Both towers in one process: what `--local` runs, and the yardstick of the services."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from twotower.engine.context_engine import ContextEngine
from twotower.engine.denoiser_engine import DenoiserEngine
from twotower.engine.effort import Effort
from twotower.engine.logprobs import token_logprobs
from twotower.engine.session import Piece, Session
from twotower.model.checkpoint import Checkpoint
from twotower.model.weights import load_context_tower, load_denoiser_tower, resolve_device, resolve_dtype
from twotower.request import NO_DRAFT, DraftUse, FinishReason, GenerationParams, Mode, TokenLogprob, check_request


@dataclass(frozen=True, slots=True)
class Written:
    """A block before it is cut."""

    tokens: list[int]
    forwards: int
    logprobs: tuple[TokenLogprob, ...] = ()
    use: DraftUse = NO_DRAFT


@dataclass(frozen=True, slots=True)
class WrittenBlock:
    """A finished block; in the AR modes one token, in speculative mode what a round wrote."""

    token_ids: list[int]
    """Cut at max_tokens and after the end-of-sequence token."""
    forwards: int
    """Of the denoiser; in AR mode, of the context tower."""
    finish_reason: FinishReason | None
    """Why it is the last, if it is."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token, if asked for."""
    use: DraftUse = NO_DRAFT


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation."""

    token_ids: list[int]
    finish_reason: FinishReason
    forwards: int
    blocks: int
    seconds: float


class LocalEngine:
    """Generates in this process, one request at a time."""

    def __init__(
        self,
        path: Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        kernels: str = "auto",
        threads: int | None = None,
        prefill_chunk: int = 128,
        experts: str = "auto",
        context_experts: str | None = None,
    ) -> None:
        """Load both towers. experts: precision of the routed experts; context_experts: of the context's, where they differ.
        kernels: what computes, see `resolve_kernels`.

        Raises CheckpointError, ConfigError.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.checkpoint = Checkpoint.open(path)
        self.limits = self.checkpoint.limits
        place = resolve_dtype(dtype, self.checkpoint), resolve_device(device)
        context = load_context_tower(self.checkpoint, *place, experts=context_experts or experts, kernels=kernels)
        self.context = ContextEngine(context)
        self.denoiser = DenoiserEngine(load_denoiser_tower(self.checkpoint, *place, experts=experts, kernels=kernels))
        self._prefill_chunk = prefill_chunk

    def generate(self, prompt: Sequence[int], params: GenerationParams) -> Generation:
        """Continue `prompt`. Raises InvalidArgument, NonFiniteLogits."""
        started = time.perf_counter()
        blocks = list(self.blocks(prompt, params))
        reason = blocks[-1].finish_reason
        assert reason is not None
        return Generation(
            [token for block in blocks for token in block.token_ids],
            reason,
            sum(block.forwards for block in blocks),
            len(blocks),
            time.perf_counter() - started,
        )

    def blocks(self, prompt: Sequence[int], params: GenerationParams) -> Iterator[WrittenBlock]:
        """Continue `prompt`, block by block. Raises InvalidArgument, NonFiniteLogits."""
        check_request(prompt, params, self.limits)
        session, write = self._open(list(prompt), params)
        while session.prefill_left:
            self.context.prefill(session, self._prefill_chunk)
        while session.finish_reason is None:
            written = write(session)
            shown = session.emit(written.tokens)
            yield WrittenBlock(
                shown, written.forwards, session.finish_reason, written.logprobs[: len(shown)], written.use.shown(len(shown))
            )
            if session.finish_reason is None and params.mode is Mode.DIFFUSION:
                self.context.commit([(session, written.tokens)])

    def _open(self, prompt: list[int], params: GenerationParams) -> tuple[Session, Callable[[Session], Written]]:
        """A session, and what writes its next block."""
        if params.mode is Mode.DIFFUSION:
            return self.context.open("local", prompt, params), self._block
        if params.mode is Mode.AR:
            return self.context.open("local", prompt, params), self._ar
        if params.mode is Mode.SPECULATIVE:
            effort = Effort(params.block_size, params.steps, self.context.times)
            return self.context.open("local", prompt, params), lambda session: self._round(session, effort)
        session = self.context.open("local", prompt[:-1], params)  # the last token is the denoiser's to read
        session.pending = prompt[-1]
        return session, self._mock_ar

    def _block(self, session: Session) -> Written:
        """Refine a block of masks."""
        block = self.denoiser.start(session.params, session.state, session.generated)
        while not block.done:
            self.denoiser.step([block])
        if block.error is not None:
            raise block.error
        return Written(block.tokens.tolist(), block.forwards, block.logprobs)

    def _ar(self, session: Session) -> Written:
        """One token by the context tower alone."""
        (token,) = self.context.decode([session])
        if not isinstance(token, int):
            raise token
        return Written([token], 1, session.logprobs)

    def _round(self, session: Session, effort: Effort) -> Written:
        """What a draft earns, or one token by the context tower alone."""
        clock, times = time.perf_counter, self.context.times
        behind = session.pending is not None
        started = clock()
        if not behind or not (steps := effort.choose()):
            written = self._ar(session)
            if behind:
                times.measured("token", clock() - started)
                effort.stepped()
            return Written(written.tokens, 0, written.logprobs, DraftUse(context_forwards=int(behind)))
        draft = self.denoiser.start(session.params, session.state, session.generated, session.pending, steps)
        while not draft.done:
            self.denoiser.step([draft])
        drafted = clock()
        if draft.error is not None:  # the text is the context's: it goes on without
            effort.give_up()
            return self._round(session, effort)
        times.measured("step", (drafted - started) / draft.forwards)
        _, (verified,) = self.context.advance([(session, Piece(draft.tokens.tolist(), None))])
        assert verified is not None
        times.measured("commit", clock() - drafted)
        if verified.error is not None:
            raise verified.error
        effort.verified(len(verified.tokens), times)
        return Written(verified.tokens, draft.forwards, verified.logprobs, verified.use(draft.tokens.shape[0]))

    def _mock_ar(self, session: Session) -> Written:
        """One token by the denoiser, from the last token and the state before it (docs/model.md, Mock-AR mode)."""
        last = torch.tensor([[session.pending]], device=self.context.tower.device)
        logits = self.denoiser.tower.denoise(last, None, [session.state])[0, -1]
        self.context.tower.commit(last, [session.state])
        session.pending = int(logits.argmax())
        if session.params.logprobs is not None:
            token = torch.tensor([session.pending], device=logits.device)
            session.logprobs = tuple(token_logprobs(logits.unsqueeze(0), token, session.params.logprobs))
        return Written([session.pending], 1, session.logprobs)
