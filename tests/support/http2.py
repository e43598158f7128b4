"""HTTP/2 written by hand, for what no client library sends."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS, ACK = 1, 4, 1

Header = tuple[bytes, bytes]


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


def header_block(headers: Sequence[Header]) -> bytes:
    """HPACK without compression: every name and value in full."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers)


def _string(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, coded = len(text) - 127, bytearray([127])
    while rest >= 128:
        coded.append(rest % 128 + 128)
        rest //= 128
    return bytes(coded) + bytes([rest]) + text


def grpc_headers(path: bytes, *more: Header, authority: bytes = b"x") -> list[Header]:
    """What a gRPC call begins with."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", authority),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *more,
    ]


def grpc_message(message: bytes) -> bytes:
    """One uncompressed message with its length."""
    return b"\x00" + struct.pack(">I", len(message)) + message


async def call(address: str, headers: Sequence[Header], data: bytes | None = None, wait_s: float = 5.0) -> bytes:
    """Open a connection, make one call on it, and return what came until its stream ended (at most `wait_s`).

    `data`: of a call that goes on after it; None: an empty message, and the call's end.
    """
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, header_block(headers)))
        writer.write(frame(DATA, END_STREAM, 1, grpc_message(b"")) if data is None else frame(DATA, 0, 1, data))
        await writer.drain()
        got = b""
        try:
            async with asyncio.timeout(wait_s):
                while not _ended(got):
                    piece = await reader.read(65536)
                    if not piece:
                        break
                    got += piece
        except (TimeoutError, ConnectionError):
            pass
        return got
    finally:
        writer.close()


def _ended(received: bytes) -> bool:
    """Whether stream 1 is over: a frame of it with END_STREAM, or RST_STREAM."""
    while len(received) >= 9:
        length, kind, flags = int.from_bytes(received[:3], "big"), received[3], received[4]
        stream = int.from_bytes(received[5:9], "big")
        if stream == 1 and (kind == 3 or (kind in (DATA, HEADERS) and flags & END_STREAM)):
            return True
        received = received[9 + length :]
    return False
