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
from twotower.model.pool import StatePool
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
        prompt: list[int],
        params: GenerationParams,
        generated: int = 0,
        state: ContextState | None = None,
    ) -> Session:
        """A session that has read nothing yet. state: an empty one of a pool; None: one of its own, which grows."""
        return Session(session_id, prompt, params, state or self.tower.new_state(), generated)

    def prefill(self, session: Session, budget: int) -> int:
        """Read up to `budget` more tokens of the prompt; returns how many."""
        start = session.state.length
        chunk = session.prompt[start : start + min(budget, session.prefill_left)]
        last = start + len(chunk) == len(session.prompt)
        tokens = torch.tensor(chunk, dtype=torch.int64, device=self.tower.device)
        need = last and session.params.mode is Mode.AR
        (session.logits,) = self.tower.prefill([tokens], [session.state], need_logits=need)
        return len(chunk)

    def commit(self, work: Sequence[tuple[Session, list[int]]]) -> list[Delta]:
        """Extend each session's state by its finished block; blocks of one size share a forward."""
        deltas: list[Delta | None] = [None] * len(work)
        by_size: dict[int, list[int]] = defaultdict(list)
        for i, (_, block) in enumerate(work):
            by_size[len(block)].append(i)
        for rows in by_size.values():
            rows.sort(key=lambda i: work[i][0].state.slot)
            tokens = torch.tensor([work[i][1] for i in rows], dtype=torch.int64)
            for i, delta in zip(rows, self.extend(tokens, [work[i][0].state for i in rows])[0], strict=True):
                deltas[i] = delta
        return [delta for delta in deltas if delta is not None]

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
                session.logits = row
        drawn = self._draw(sessions)
        for session, token in zip(sessions, drawn, strict=True):
            session.pending = token if isinstance(token, int) else None
        return drawn

    def extend(
        self, tokens: Tensor, states: Sequence[ContextState], *, need_logits: bool = False, need_deltas: bool = True
    ) -> tuple[list[Delta], Tensor | None]:
        """`ContextTower.commit` of tokens (B, L) on the host, as a replay where that is possible.

        Without need_deltas a replay returns none of them.
        """
        for state in states:
            state.begin()
        if self._graphs is not None and (pool := common_pool(self.tower, states)) is not None:
            return self._graphs.commit(pool, tokens, states, need_logits=need_logits, need_deltas=need_deltas)
        return self.tower.commit(tokens.to(self.tower.device), states, need_logits=need_logits)

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
