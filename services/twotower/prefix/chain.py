"""The name of a prompt's prefix: a hash over its chunks, each chained to the one before. No torch here.

Two prompts share links exactly as far as they share whole chunks of tokens, if their states have the same
checkpoint, dtype and chunk size. Only whole chunks have a link: the tokens after the last one are always read again.
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
"""Bytes of a link in announcements, where a collision costs a detour, but never gives a wrong state."""

MAX_ANNOUNCED = 256
"""The most links in an announcement, which each gateway reads once a second: 4 KB."""

_PERSON = b"twotower.prefix1"
"""Keeps these hashes apart from all others; its last character is the version of the hashed content."""


@dataclass(frozen=True, slots=True)
class ChainSpec:
    """Everything besides the tokens that a chain depends on."""

    identity: str
    """The checkpoint's identity."""
    dtype: str
    """The dtype of weights, conv tails and KV: float32 or bfloat16."""
    chunk_tokens: int
    """Tokens of a chunk, at least 1."""

    @property
    def root(self) -> bytes:
        """The link to which the first chunk is chained."""
        # As JSON, no two specs have the same bytes.
        spec = json.dumps([self.identity, self.dtype, self.chunk_tokens]).encode()
        return hashlib.blake2b(spec, digest_size=LINK_BYTES, person=_PERSON).digest()

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
    """The short form of a link, for announcements."""
    return link[:SHORT_BYTES]


def pack_links(links: Iterable[bytes]) -> str:
    """The first `MAX_ANNOUNCED` links for an announcement: their short forms in hex, one after the other."""
    return b"".join(map(short, islice(links, MAX_ANNOUNCED))).hex()


def unpack_links(packed: str) -> frozenset[bytes]:
    """The short forms in an announcement; an empty set if `packed` is no such announcement."""
    try:
        raw = bytes.fromhex(packed)
    except ValueError:
        return frozenset()
    return frozenset(raw[i : i + SHORT_BYTES] for i in range(0, len(raw) - SHORT_BYTES + 1, SHORT_BYTES))
