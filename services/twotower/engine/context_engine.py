"""What the context tower does for sessions: prefill chunks, commits, AR steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.engine.commit_graphs import CommitGraphs
from twotower.engine.effort import Times
from twotower.engine.graphs import WarmUp, common_pool
from twotower.engine.logprobs import token_logprobs
from twotower.engine.sampling import ar_uniforms, filters
from twotower.engine.session import STEP, Piece, Session
from twotower.errors import NonFiniteLogits
from twotower.model.context_tower import ContextTower
from twotower.model.delta_batch import DeltaBatch
from twotower.model.pool import StatePool
from twotower.model.rows import rows_of
from twotower.model.state import ContextState, Delta
from twotower.request import DraftUse, GenerationParams, TokenLogprob
from twotower_kernels.unmask import draw

NOT_FINITE = "the context tower's logits are not finite"


class StatesLostError(Exception):
    """A commit has failed after it had begun to change states, and which layers it changed is not known."""


@contextmanager
def _changing_states() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise StatesLostError from error


@dataclass(frozen=True, slots=True)
class Round:
    """What a draft came to: the tokens that AR's steps would have written."""

    tokens: list[int]
    """Drawn, not yet emitted: those of the draft that agree, and the one that follows them."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token, if asked for."""
    error: NonFiniteLogits | None = None

    def use(self, block_size: int) -> DraftUse:
        """What the round took; block_size: tokens of its draft, of which the first was known."""
        return DraftUse(block_size - 1, len(self.tokens) - 1, 1)


class ContextEngine:
    """Each method is one or few forwards of the frozen tower."""

    def __init__(self, tower: ContextTower, *, graphs: bool | None = None) -> None:
        """graphs: whether forwards over a pool go through `engine.graphs`; None: on a GPU, with kernels made for it."""
        self.tower = tower
        use = tower.device.type == "cuda" if graphs is None else graphs
        self._graphs = CommitGraphs(tower) if use and tower.kernels.paged else None
        self.decay_rates = tower.decay_rates()
        self.times = Times()
        """What AR steps and verifications took here. Those who run the denoisers add what their forwards took."""

    def open(
        self,
        session_id: str,
        tokens: Sequence[int],
        params: GenerationParams,
        generated: int = 0,
        state: ContextState | None = None,
        rounds: Sequence[int] = (),
    ) -> Session:
        """A session that has read nothing yet; tokens, generated and rounds as `Session` takes them.

        state: an empty one of a pool; None: one of its own, which grows.
        """
        return Session(session_id, tokens, params, state or self.tower.new_state(), generated, rounds)

    def prefill(self, session: Session, budget: int) -> int:
        """Read up to `budget` more tokens of the prompt; returns how many."""
        tokens = min(budget, session.prefill_left)
        self.read([(session, tokens)])
        return tokens

    def read(self, chunks: Sequence[tuple[Session, int]]) -> None:
        """Read the next tokens of each session's prompt, the given number, in one forward.

        When it raises, the states of all these sessions are lost: see `restart`.
        """
        tokens, need_logits = [], []
        for session, count in chunks:
            start = session.state.length
            tokens.append(torch.tensor(session.prompt[start : start + count], dtype=torch.int64, device=self.tower.device))
            need_logits.append(start + count == len(session.prompt) and session.params.mode.autoregressive)
        logits = self.tower.prefill(tokens, [session.state for session, _ in chunks], need_logits=need_logits)
        for (session, _), row in zip(chunks, logits, strict=True):
            session.logits = row

    @staticmethod
    def restart(session: Session) -> None:
        """Let a session whose state is lost begin again, in the same place: the same forwards give it the same bits."""
        session.state.length = 0
        session.logits = None
        session.rewrite()

    def commit(self, work: Sequence[tuple[Session, Sequence[int]]]) -> list[Delta]:
        """Extend each session's state by its finished block; returns each one's delta."""
        by_size: dict[int, list[int]] = defaultdict(list)
        for row, (_, block) in enumerate(work):
            by_size[len(block)].append(row)
        deltas: dict[int, Delta] = {}
        for rows in by_size.values():
            rows.sort(key=lambda row: work[row][0].state.slot)
            batch = self.commit_together([work[row] for row in rows])
            deltas |= {row: batch.row(i) for i, row in enumerate(rows)}
        return [deltas[row] for row in range(len(work))]

    def commit_together(self, work: Sequence[tuple[Session, Sequence[int]]]) -> DeltaBatch:
        """As `commit`, for blocks of one size: one forward, whose deltas stay together. Fastest in the order of slots.

        Raises StatesLostError when it fails while states change. When it raises anything else, none has changed.
        """
        tokens = torch.tensor([list(block) for _, block in work], dtype=torch.int64)
        states = [session.state for session, _ in work]
        if self.tower.kernels.paged or (self.tower.compiled and len(states) == 1):
            with _changing_states():
                return self.extend(tokens, states)[0]
        verified = self.tower.verify(tokens.to(self.tower.device), states, need_logits=False)
        with _changing_states():
            return self.tower.accept_all(states, verified)

    @torch.inference_mode()
    def advance(self, work: Sequence[tuple[Session, Piece]]) -> tuple[DeltaBatch, list[Round | None]]:
        """Take what is kept of each piece into its session's state, in one forward over pieces of one size.

        A draft is verified: its row of the second result is what it came to, and the session's `pending` token is the
        last one of that. It raises what `commit_together` raises.
        """
        drafts = [session for session, piece in work if piece.kept is None]
        assert all(piece.tokens[0] == session.pending for session, piece in work if piece.kept is None), (
            "not the token that is due"
        )
        if not drafts and all(piece.kept == len(piece.tokens) for _, piece in work):
            return self.commit_together([(session, piece.tokens) for session, piece in work]), [None] * len(work)
        states = [session.state for session, _ in work]
        tokens = torch.tensor([piece.tokens for _, piece in work], dtype=torch.int64)
        wanted = [piece.kept is None for _, piece in work]
        verified = self.tower.verify(tokens.to(self.tower.device), states, need_logits=wanted)
        found = iter(() if verified.logits is None else self._verify(drafts, tokens[wanted], verified.logits))
        rounds = [next(found) if want else None for want in wanted]
        counts = [len(round_.tokens) if round_ else piece.kept or 0 for round_, (_, piece) in zip(rounds, work, strict=True)]
        whole = not self.tower.kernels.paged and min(counts) == verified.length
        with _changing_states():
            deltas = self.tower.accept_all(states, verified) if whole else self.tower.accept(states, verified, counts)
        for round_, (session, _) in zip(rounds, work, strict=True):
            if round_ is not None:
                session.pending = round_.tokens[-1]
                session.rounds.append(len(round_.tokens))
        return deltas, rounds

    def _verify(self, sessions: Sequence[Session], drafts: Tensor, logits: Tensor) -> list[Round]:
        """What AR would have written, up to its first token that is not the draft's.

        drafts (R, L), on the host; logits (R, L, vocab).

        A round ends before logits that are not finite, unless they are its first: AR would write what comes before them.
        """
        length = drafts.shape[1]
        drawn, sound = _choose(
            [session.params for session in sessions for _ in range(length)], _chances(sessions, length), logits.flatten(0, 1)
        )
        rows = zip(sessions, drafts.tolist(), drawn.view(-1, length), sound.view(-1, length).tolist(), strict=True)
        out = []
        for row, (session, draft, chosen, fine) in enumerate(rows):
            own = chosen.tolist()
            agree = [a == b and ok for a, b, ok in zip(draft[1:], own, fine[1:], strict=False)]
            kept = 1 + (agree.index(False) if False in agree else length - 1)
            error = None if fine[0] else NonFiniteLogits(NOT_FINITE)
            logprobs: list[TokenLogprob] = []
            if session.params.logprobs is not None:
                logprobs = token_logprobs(logits[row, :kept], chosen[:kept], session.params.logprobs)
            out.append(Round(own[:kept], tuple(logprobs), error))
        return out

    def decode(self, sessions: Sequence[Session]) -> list[int | NonFiniteLogits]:
        """The next AR token of each prefilled session: drawn, not yet emitted. One forward for all that need one.

        A session that asks for logprobs has its token's in `logprobs` then.
        """
        behind = sorted((s for s in sessions if s.pending is not None), key=lambda session: session.state.slot)
        if behind:
            tokens = torch.tensor([[session.pending] for session in behind], dtype=torch.int64)
            _, logits = self.extend(tokens, [session.state for session in behind], need_logits=True, need_deltas=False)
            assert logits is not None
            for session, row in zip(behind, logits, strict=True):
                session.logits, session.pending = row, None
        drawn = self._draw(sessions)
        for session in behind:
            session.rounds.append(STEP)
        for session, token in zip(sessions, drawn, strict=True):
            session.pending = token if isinstance(token, int) else None
        return drawn

    @torch.inference_mode()
    def extend(
        self, tokens: Tensor, states: Sequence[ContextState], *, need_logits: bool = False, need_deltas: bool = True
    ) -> tuple[DeltaBatch, Tensor | None]:
        """Extend each state by its row of tokens (B, L), on the host, in one forward; as a replay where that is possible.

        Returns what changed (a replay: where needed), and the logits of the last position (B, vocab) fp32 where needed.
        When it raises, the states are lost: see `restart`.
        """
        for state in states:
            state.begin()
        if self._graphs is not None and (pool := common_pool(self.tower, states)) is not None:
            return self._graphs.commit(pool, tokens, states, need_logits=need_logits, need_deltas=need_deltas)
        tokens, length = tokens.to(self.tower.device), tokens.shape[1]
        if self.tower.compiled and len(states) == 1:
            (delta,), logits = self.tower.commit(tokens, states, need_logits=need_logits)
            return DeltaBatch.of(delta), logits
        h, changes = self.tower.forward_rows(tokens, rows_of(states, self.tower.kernels), need_hidden=need_logits)
        for state in states:
            state.length += length
        return DeltaBatch(length, changes), self.tower.logits(h) if need_logits else None

    def warm_up(self, pool: StatePool, *, batches: Iterable[int], contexts: Iterable[int], ar: bool = True) -> WarmUp:
        """Compile and capture commits of the trained block size, and AR steps: see `CommitGraphs.warm_up`."""
        if self._graphs is None:
            return WarmUp(0, 0, 0.0)
        size = self.tower.config.block_size
        return self._graphs.warm_up(pool, batches=batches, contexts=contexts, block_size=size, ar=ar)

    @torch.inference_mode()
    def _draw(self, sessions: Sequence[Session]) -> list[int | NonFiniteLogits]:
        logits = torch.stack([_require(session.logits) for session in sessions])
        drawn, sound = _choose([session.params for session in sessions], _chances(sessions, 1), logits)
        for i, session in enumerate(sessions):
            if session.params.logprobs is not None:
                session.logprobs = tuple(token_logprobs(logits[i : i + 1], drawn[i : i + 1], session.params.logprobs))
        return [token if ok else NonFiniteLogits(NOT_FINITE) for token, ok in zip(drawn.tolist(), sound.tolist(), strict=True)]


def _chances(sessions: Sequence[Session], count: int) -> Tensor:
    """What the next `count` tokens of each session are drawn with, one session behind the other: fp64, 0 where greedy."""
    return torch.cat(
        [
            ar_uniforms(s.params.seed, s.generated, count)
            if s.params.temperature > 0
            else torch.zeros(count, dtype=torch.float64)
            for s in sessions
        ]
    )


def _choose(params: Sequence[GenerationParams], chances: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """AR's tokens (N,) int64 from logits (N, vocab), by each row's parameters and chance; and whether a row is finite."""
    temperature = torch.tensor([one.temperature for one in params], device=logits.device)
    drawn = draw(logits, temperature, chances.to(logits.device), **filters(params, logits.device))
    return drawn, logits.isfinite().all(-1)


def _require(logits: Tensor | None) -> Tensor:
    assert logits is not None, "the session's prompt is not prefilled"
    return logits
