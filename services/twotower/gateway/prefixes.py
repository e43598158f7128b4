"""Where a prompt's prefix probably is: what contexts announce to hold, and where this gateway sent prompts lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from twotower.prefix.chain import ChainSpec, short

MAX_SENT = 32_768
"""Links remembered: those of 64 prompts of 64k tokens, at 128 a chunk."""


class PromptChains:
    """One prompt's chain, in short links, for each way contexts chunk (they all should in the same); made when first needed."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = prompt
        self._chains: dict[ChainSpec, list[bytes]] = {}

    def of(self, spec: ChainSpec) -> list[bytes]:
        """One short link for each whole chunk."""
        if spec not in self._chains:
            self._chains[spec] = [short(link) for link in spec.chain(self._prompt)]
        return self._chains[spec]


class SentPrefixes:
    """Which context was last given each link. Bridges the time until it announces what it made of it."""

    def __init__(self, limit: int = MAX_SENT) -> None:
        self._limit = limit
        self._sent: OrderedDict[bytes, str] = OrderedDict()

    def add(self, chain: Sequence[bytes], address: str) -> None:
        """A prompt was sent there."""
        for link in reversed(chain):  # what is forgotten first is its end
            self._sent[link] = address
            self._sent.move_to_end(link)
        while len(self._sent) > self._limit:
            self._sent.popitem(last=False)

    def chunks(self, chain: Sequence[bytes], address: str, held: Collection[bytes]) -> int:
        """How many chunks, from the start, the context probably holds; `held`: what it announces."""
        for chunks in range(len(chain), 0, -1):
            link = chain[chunks - 1]
            if link in held or self._sent.get(link) == address:
                return chunks
        return 0
