"""Which prefixes repeat: the links that prompts had, without their states. No torch here.

A state is worth keeping where prompts diverge: after a system prompt, not inside it. That place is unknown when the
first such prompt comes, and a state at every border would cost far more than the tokens it saves. So the links of
all prompts are remembered, 16 bytes each, and the second prompt shows where it diverges from the first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Borders:
    """The most recently seen links, at most `limit` of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._met: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._met)

    def meet(self, chain: Sequence[bytes]) -> int:
        """Remember a prompt's chain; returns how many of its chunks, from the start, an earlier prompt had too.

        If that is more than the cache holds a state for, the state at that border is the one to keep.
        """
        repeated = 0
        for link in chain:
            if link not in self._met:
                break
            repeated += 1
        # The first link is renewed last, so that a chain loses its end first when it is forgotten piece by piece.
        for link in reversed(chain):
            self._met[link] = None
            self._met.move_to_end(link)
        while len(self._met) > self._limit:
            self._met.popitem(last=False)
        return repeated
