"""The prefix cache of a context: states at chunk borders of prompts, in its own memory and behind that in Redis.

A state is copied in and out, not shared: of its bytes most are S, which every session changes, and a copy costs
little beside reading the prompt. Prompts are read in chunks that begin at multiples of their size, whatever else is
computed and whatever was cached, so that a hit has the bits of a fresh prefill.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from twotower.context.messages import Snapshot
from twotower.engine.session import Session
from twotower.model.state import ContextState
from twotower.prefix.borders import Borders
from twotower.prefix.chain import MAX_ANNOUNCED, ChainSpec, pack_links
from twotower.prefix.index import PrefixIndex
from twotower.prefix.redis_tier import RedisTier
from twotower.prefix.stats import TierStats
from twotower.wire.frames import Key
from twotower.wire.state import fill_state, state_tensors

SNAPSHOTS = 16
"""About how many of a new prompt's borders are kept: which of them will repeat is not known yet."""

MAX_MET = 65_536
"""Links that are remembered of prompts, with their states or without: 16 bytes each."""


@dataclass(frozen=True, slots=True)
class PromptBorders:
    """A prompt's links, and where its state is to be kept while it is read."""

    links: Sequence[bytes]
    """Of its whole chunks; a last one that would leave nothing to read is not among them."""
    repeated: int
    """Chunks that an earlier prompt had, too."""

    def keeps(self, chunks: int) -> bool:
        """Whether to keep the state behind this many chunks: where prompts were seen to part, and at even distances."""
        every = 1
        while len(self.links) > SNAPSHOTS * every:  # powers of two, so that prompts of all lengths have borders in common
            every *= 2
        return 0 < chunks <= len(self.links) and (chunks == self.repeated or chunks % every == 0)


class CachedPrefix(NamedTuple):
    """A cached beginning of a prompt."""

    chunks: int
    snapshot: Snapshot


class PrefixCache:
    """What a context knows of prompts that it has read. Its loop's own, but for what says otherwise."""

    def __init__(self, spec: ChainSpec, capacity: int, rates: Mapping[int, Tensor], redis: RedisTier | None) -> None:
        """capacity: bytes of states in this process's memory. rates: the tower's decay rates, by layer.

        redis: the tier that replicas share, which the service asks where `begin` finds nothing.
        """
        self.spec = spec
        self.redis = redis
        self._rates = rates
        self._lock = threading.Lock()
        """Of the index, which the event loop reads for its announcements."""
        self._stats = TierStats()
        self._index: PrefixIndex[Snapshot] = PrefixIndex(capacity, spec.chunk_tokens, lambda entry: None, stats=self._stats)
        self._borders = Borders(MAX_MET)

    @property
    def enabled(self) -> bool:
        """Whether anything is ever kept."""
        return self._index.capacity > 0 or self.redis is not None

    @property
    def shared(self) -> bool:
        """Whether other replicas may have what this one has not."""
        return self.redis is not None

    @property
    def tiers(self) -> dict[str, TierStats]:
        """What each tier counts, by its name."""
        return {"device": self._stats} | ({"redis": self.redis.stats} if self.redis is not None else {})

    def announced(self) -> str:
        """For the registry: which prefixes are here. From any thread."""
        with self._lock:
            return pack_links(self._index.newest(MAX_ANNOUNCED))

    def begin(self, session: Session) -> tuple[PromptBorders, CachedPrefix | None]:
        """Where the session's prompt can be cached, and the cached beginning that its empty state was filled with."""
        links = self.spec.chain(session.prompt[:-1]) if self.enabled else []
        borders = PromptBorders(links, self._borders.meet(links))
        if not links:
            return borders, None
        with self._lock:
            found = self._index.longest(links)
        if found is None:
            return borders, None
        match = CachedPrefix(found.chunks, found.entry.value)
        self._fill(session.state, match)
        return borders, match

    def restore(self, session: Session, borders: PromptBorders, match: CachedPrefix) -> None:
        """Fill the session's empty state with what another replica had, and keep it here, too."""
        self._fill(session.state, match)
        self._keep(session.state, borders.links[match.chunks - 1], protected=True)

    def keep(self, session: Session, borders: PromptBorders) -> None:
        """After a chunk: keep the state, if this is a border to keep it at."""
        chunks, rest = divmod(session.state.length, self.spec.chunk_tokens)
        if rest == 0 and session.state.length <= len(session.prompt) and borders.keeps(chunks):
            self._keep(session.state, borders.links[chunks - 1], protected=chunks == borders.repeated)

    def _fill(self, state: ContextState, match: CachedPrefix) -> None:
        rates = {Key("a", layer): rate for layer, rate in self._rates.items()}
        fill_state(state, {**match.snapshot, **rates}, match.chunks * self.spec.chunk_tokens)

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
