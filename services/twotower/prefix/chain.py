"""The name of a prompt's prefix: a hash over its chunks, each chained to the one before. No torch here.

Two prompts share a link exactly as far as they share whole chunks of tokens, and their states are of the same
checkpoint, dtype and chunk size. Only whole chunks have a link: what is left at the end is always read anew.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

LINK_BYTES = 16
SHORT_BYTES = 8
"""Of a link, in announcements: there a collision costs a detour, never a wrong state."""

MAX_ANNOUNCED = 256
"""Links in an announcement, which is read once a second by each gateway: 4 KB."""

_PERSON = b"twotower.prefix1"
"""Keeps these hashes apart from all others; its last letter is the version of what is hashed."""


@dataclass(frozen=True, slots=True)
class ChainSpec:
    """What a chain depends on besides the tokens."""

    identity: str
    """Of the checkpoint."""
    dtype: str
    """Of weights, conv tails and KV: float32 or bfloat16."""
    chunk_tokens: int
    """Tokens of a chunk, at least 1."""

    @property
    def root(self) -> bytes:
        """What the first chunk is chained to."""
        # As JSON, no two specs have the same bytes.
        told = json.dumps([self.identity, self.dtype, self.chunk_tokens]).encode()
        return hashlib.blake2b(told, digest_size=LINK_BYTES, person=_PERSON).digest()

    def chain(self, tokens: Sequence[int]) -> list[bytes]:
        """One link (16 bytes) for each whole chunk of `tokens`: the i-th names the first (i + 1) chunks.

        Raises struct.error for a token that does not fit 64 bits.
        """
        size, link, links = self.chunk_tokens, self.root, []
        pack = struct.Struct(f"<{size}q").pack
        for start in range(0, len(tokens) - size + 1, size):
            digest = hashlib.blake2b(link, digest_size=LINK_BYTES, person=_PERSON)
            digest.update(pack(*tokens[start : start + size]))
            link = digest.digest()
            links.append(link)
        return links


def short(link: bytes) -> bytes:
    """A link as it is announced."""
    return link[:SHORT_BYTES]


def pack_links(links: Iterable[bytes]) -> str:
    """The first `MAX_ANNOUNCED` links for an announcement: their short forms in hex, one after the other."""
    return b"".join(map(short, islice(links, MAX_ANNOUNCED))).hex()


def unpack_links(packed: str) -> frozenset[bytes]:
    """The short forms in an announcement; none if it is no such announcement."""
    try:
        raw = bytes.fromhex(packed)
    except ValueError:
        return frozenset()
    return frozenset(raw[i : i + SHORT_BYTES] for i in range(0, len(raw) - SHORT_BYTES + 1, SHORT_BYTES))
