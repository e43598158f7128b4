"""Messages as a broken or hostile client might send them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from google.protobuf.message import DecodeError, Message


def mutated(message: Message, seed: int, count: int) -> Iterator[bytes]:
    """Bytes near those of `message`: flipped, cut, put in, repeated."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(message.SerializeToString())
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(data) + 1)
            kind = rng.randrange(5)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[at:]
            elif kind == 2:
                data[at:at] = rng.randbytes(rng.choice((1, 2, 10)))
            elif kind == 3:
                data[at:at] = rng.choice((b"\xff" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"\xc3\x28", b"\x0b" * 200))
            else:
                data += data[:at]
        yield bytes(data)


def is_valid(data: bytes, kind: type[Message]) -> bool:
    """Whether `data` is a message of this kind."""
    try:
        kind.FromString(data)
    except DecodeError:
        return False
    return True
