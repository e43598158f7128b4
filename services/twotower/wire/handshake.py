"""The handshake between a context and a worker: an incompatible pair refuses each other instead of computing nonsense."""

from __future__ import annotations

import torch

from twotower.errors import Incompatible
from twotower.internal.v1 import link_pb2
from twotower.wire.frames import DTYPE_TO_PB

SCHEMA_VERSION = 7
"""Version of the link's protocol: messages, names and layout of frames."""


def make_hello(
    identity: str,
    dtype: torch.dtype,
    worker_id: str,
    transport: link_pb2.TransportOffer | None = None,
) -> link_pb2.Hello:
    """A worker's first message. Without a transport, tensors come by gRPC."""
    return link_pb2.Hello(
        schema_version=SCHEMA_VERSION,
        checkpoint_id=identity,
        dtype=DTYPE_TO_PB[dtype],
        worker_id=worker_id,
        transport=transport,
    )


def check_hello(hello: link_pb2.Hello, identity: str, dtype: torch.dtype) -> None:
    """Raise Incompatible, naming the field, if this worker cannot work with this context."""
    for field, theirs, ours in (
        ("schema_version", hello.schema_version, SCHEMA_VERSION),
        ("checkpoint_id", hello.checkpoint_id, identity),
        ("dtype", hello.dtype, DTYPE_TO_PB[dtype]),
    ):
        if theirs != ours:
            raise Incompatible(f"{field}: the worker has {theirs!r}, the context {ours!r}")
