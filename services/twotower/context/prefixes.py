"""The prefix cache of a context: states at chunk borders of prompts, in its own memory and behind that in Redis.

A state is copied in and out, not shared: of its bytes most are S, which every session changes, and a copy costs
little beside reading the prompt. Prompts are read in chunks that begin at multiples of their size, whatever else is
computed and whatever was cached, so that a hit has the bits of a fresh prefill.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from twotower.engine.session import Session
from twotower.engine.thread import EngineThread
from twotower.model.state import ContextState
from twotower.prefix.borders import Borders
from twotower.prefix.chain import MAX_ANNOUNCED, ChainSpec, pack_links
from twotower.prefix.index import PrefixIndex
from twotower.prefix.redis_tier import RedisTier
from twotower.prefix.stats import TierStats
from twotower.wire.frames import Key
from twotower.wire.state import fill_state, state_tensors

SNAPSHOTS = 16
"""About so many of a prompt's borders are kept when it is first met: nobody knows yet which of them will repeat."""

MAX_MET = 65_536
"""Links that are remembered of prompts, with their states or without: 16 bytes each."""

Snapshot = Mapping[Key, Tensor]
"""As `state_tensors`, in tensors that nobody changes."""


@dataclass(frozen=True, slots=True)
class PromptBorders:
    """A prompt's links, and where its state is to be kept while it is read."""

    links: Sequence[bytes]
    """Of its whole chunks; a last one that would leave nothing to read is not among them."""
    repeated: int
    """Chunks that an earlier prompt had, too."""

    def keeps(self, chunks: int) -> bool:
        """Whether to keep the state behind so many chunks: where prompts were seen to part, and here and there."""
        every = 1
        while len(self.links) > SNAPSHOTS * every:  # powers of two, so that prompts of all lengths have borders in common
            every *= 2
        return 0 < chunks <= len(self.links) and (chunks == self.repeated or chunks % every == 0)


class PrefixCache:
    """What a context knows of prompts it has read. Its states are copied on the engine's thread."""

    def __init__(
        self, spec: ChainSpec, capacity: int, rates: Mapping[int, Tensor], thread: EngineThread, redis: RedisTier | None
    ) -> None:
        """capacity: bytes of states in this process's memory. rates: the tower's decay rates, by layer."""
        self.spec = spec
        self._rates = rates
        self._thread = thread
        self._redis = redis
        self._lock = threading.Lock()
        self._stats = TierStats()
        self._index: PrefixIndex[Snapshot] = PrefixIndex(capacity, spec.chunk_tokens, lambda entry: None, stats=self._stats)
        self._borders = Borders(MAX_MET)

    @property
    def enabled(self) -> bool:
        """Whether anything is ever kept."""
        return self._index.capacity > 0 or self._redis is not None

    @property
    def tiers(self) -> dict[str, TierStats]:
        """What each tier counts, by its name."""
        return {"device": self._stats} | ({"redis": self._redis.stats} if self._redis is not None else {})

    def announced(self) -> str:
        """For the registry: which prefixes are here."""
        with self._lock:
            return pack_links(self._index.newest(MAX_ANNOUNCED))

    async def restore(self, session: Session) -> PromptBorders:
        """Take the session's empty state as far into its prompt as a cached one goes."""
        links = self.spec.chain(session.prompt[:-1]) if self.enabled else []
        borders = PromptBorders(links, self._borders.meet(links))
        if not links:
            return borders
        with self._lock:
            match = self._index.longest(links)
        if match is not None:
            await self._thread.run(self._fill, session.state, match.entry.value, match.chunks)
            if self._redis is not None:  # it has been met again: others may meet it, too
                self._redis.store_later(links[: match.chunks], match.chunks, match.entry.value)
        elif self._redis is not None and (chunks := await self._redis.longest(links)):
            tensors = await self._redis.load(links[:chunks], chunks)
            if tensors is not None:
                await self._thread.run(self._fill, session.state, tensors, chunks)
                await self._thread.run(self._keep, session.state, links[chunks - 1], protected=True)
        return borders

    def keep(self, session: Session, borders: PromptBorders) -> None:
        """On the engine's thread, between chunks: keep the state, if this is a border to keep it at."""
        chunks, rest = divmod(session.state.length, self.spec.chunk_tokens)
        if rest == 0 and borders.keeps(chunks):
            self._keep(session.state, borders.links[chunks - 1], protected=chunks == borders.repeated)

    async def close(self) -> None:
        """End what is being written."""
        if self._redis is not None:
            await self._redis.close()

    def _fill(self, state: ContextState, tensors: Snapshot, chunks: int) -> None:
        rates = {Key("a", layer): rate for layer, rate in self._rates.items()}
        fill_state(state, {**tensors, **rates}, chunks * self.spec.chunk_tokens)

    def _keep(self, state: ContextState, link: bytes, *, protected: bool) -> None:
        tensors = {key: tensor for key, tensor in state_tensors(state, self._rates) if key.name != "a"}
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        with self._lock:
            known = link in self._index
        if known or num_bytes > self._index.capacity:
            return
        snapshot = {key: tensor.clone() for key, tensor in tensors.items()}
        with self._lock:
            self._index.put(link, snapshot, num_bytes, protected=protected)
