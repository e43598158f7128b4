"""The handshake between a context and a worker: an incompatible pair refuses each other instead of computing nonsense."""

from __future__ import annotations

import torch

from twotower.errors import Incompatible
from twotower.v1 import context_pb2
from twotower.wire.frames import DTYPE_TO_PB

SCHEMA_VERSION = 5
"""Version of the attach protocol: messages, names and layout of frames."""


def make_hello(
    identity: str,
    dtype: torch.dtype,
    worker_id: str,
    session_id: str,
    lease: int,
    transport: context_pb2.TransportOffer | None = None,
) -> context_pb2.Hello:
    """A worker's first message. Without a transport, tensors come by gRPC."""
    return context_pb2.Hello(
        schema_version=SCHEMA_VERSION,
        checkpoint_id=identity,
        dtype=DTYPE_TO_PB[dtype],
        worker_id=worker_id,
        session_id=session_id,
        lease=lease,
        transport=transport,
    )


def check_hello(hello: context_pb2.Hello, identity: str, dtype: torch.dtype) -> None:
    """Raise Incompatible, naming the field, if this worker cannot work with this context."""
    for field, theirs, ours in (
        ("schema_version", hello.schema_version, SCHEMA_VERSION),
        ("checkpoint_id", hello.checkpoint_id, identity),
        ("dtype", hello.dtype, DTYPE_TO_PB[dtype]),
    ):
        if theirs != ours:
            raise Incompatible(f"{field}: the worker has {theirs!r}, the context {ours!r}")
