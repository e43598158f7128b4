"""What the context tower does for sessions: prefill chunks, commits, AR steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from twotower.engine.commit_graphs import CommitGraphs
from twotower.engine.graphs import WarmUp, common_pool
from twotower.engine.logprobs import token_logprobs
from twotower.engine.sampling import filters, uniforms
from twotower.engine.session import Session
from twotower.errors import NonFiniteLogits
from twotower.model.context_tower import ContextTower
from twotower.model.delta_batch import DeltaBatch
from twotower.model.pool import StatePool
from twotower.model.rows import rows_of
from twotower.model.state import ContextState, Delta
from twotower.request import GenerationParams, Mode
from twotower_kernels.unmask import draw


class ContextEngine:
    """Each method is one or few forwards of the frozen tower."""

    def __init__(self, tower: ContextTower, *, graphs: bool | None = None) -> None:
        """graphs: whether forwards over a pool go through `engine.graphs`; None: on a GPU, with kernels made for it."""
        self.tower = tower
        use = tower.device.type == "cuda" if graphs is None else graphs
        self._graphs = CommitGraphs(tower) if use and tower.kernels.paged else None
        self.decay_rates = tower.decay_rates()

    def open(
        self,
        session_id: str,
        tokens: Sequence[int],
        params: GenerationParams,
        generated: int = 0,
        state: ContextState | None = None,
    ) -> Session:
        """A session that has read nothing yet; tokens and generated as `Session` takes them.

        state: an empty one of a pool; None: one of its own, which grows.
        """
        return Session(session_id, tokens, params, state or self.tower.new_state(), generated)

    def prefill(self, session: Session, budget: int) -> int:
        """Read up to `budget` more tokens of the prompt; returns how many."""
        tokens = min(budget, session.prefill_left)
        self.read([(session, tokens)])
        return tokens

    def read(self, chunks: Sequence[tuple[Session, int]]) -> None:
        """Read the next tokens of each session's prompt, as many as are said, in one forward.

        When it raises, the states of all these sessions are lost: see `restart`.
        """
        tokens, need_logits = [], []
        for session, count in chunks:
            start = session.state.length
            tokens.append(torch.tensor(session.prompt[start : start + count], dtype=torch.int64, device=self.tower.device))
            need_logits.append(start + count == len(session.prompt) and session.params.mode is Mode.AR)
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

        When the forward raises, no state has changed; on a GPU it may have, but there the device is lost then.
        """
        tokens = torch.tensor([list(block) for _, block in work], dtype=torch.int64)
        states = [session.state for session, _ in work]
        if self.tower.kernels.paged or (self.tower.compiled and len(states) == 1):
            return self.extend(tokens, states)[0]
        verified = self.tower.verify(tokens.to(self.tower.device), states, need_logits=False)
        return self.tower.accept_all(states, verified)

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
        temperature = torch.tensor([session.params.temperature for session in sessions], device=logits.device)
        chances = [uniforms(s.params.seed, s.generated, 0, 1) if s.params.temperature > 0 else torch.zeros(1) for s in sessions]
        choice = filters([session.params for session in sessions], logits.device)
        drawn = draw(logits, temperature, torch.cat(chances).double().to(logits.device), **choice)
        for i, session in enumerate(sessions):
            if session.params.logprobs is not None:
                session.logprobs = tuple(token_logprobs(logits[i : i + 1], drawn[i : i + 1], session.params.logprobs))
        tokens = drawn.tolist()
        sound = logits.isfinite().all(-1).tolist()
        error = NonFiniteLogits("the context tower's logits are not finite")
        return [token if ok else error for token, ok in zip(tokens, sound, strict=True)]


def _require(logits: Tensor | None) -> Tensor:
    assert logits is not None, "the session's prompt is not prefilled"
    return logits
