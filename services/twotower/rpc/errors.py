"""Errors on the wire: TwoTowerError to a gRPC status, and back to the same class on the other side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc

from twotower.errors import (
    DeadlineExceeded,
    Incompatible,
    InvalidArgument,
    LeaseLost,
    NonFiniteLogits,
    Overloaded,
    SessionNotFound,
    TwoTowerError,
    Unavailable,
)
from twotower.status import STATUS

ERROR_KEY = "twotower-error"
"""Trailing metadata that names the class, since several classes share a status code."""

RETRY_KEY = "retry-after-s"
"""Trailing metadata of a refusal that is worth a retry: the seconds to wait before it."""

MAX_DETAILS = 1000
"""The most characters of a message that are sent, since headers are small."""

_CLASSES: dict[str, type[TwoTowerError]] = {cls.__name__: cls for cls in STATUS}

_BY_CODE: dict[grpc.StatusCode, type[TwoTowerError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: Incompatible,
    grpc.StatusCode.UNIMPLEMENTED: Incompatible,
    grpc.StatusCode.NOT_FOUND: SessionNotFound,
    grpc.StatusCode.ABORTED: LeaseLost,
    grpc.StatusCode.DATA_LOSS: NonFiniteLogits,
}


def error_metadata(error: TwoTowerError) -> tuple[tuple[str, str], ...]:
    """Trailing metadata for `error`."""
    metadata: tuple[tuple[str, str], ...] = ((ERROR_KEY, type(error).__name__),)
    if isinstance(error, Overloaded):
        metadata += ((RETRY_KEY, str(error.retry_after_s)),)
    return metadata


def raised_by_peer(rpc: grpc.aio.AioRpcError) -> bool:
    """Whether the other side's own code ended the call, rather than gRPC (connection refused or lost, deadline, ...)."""
    return _name_of(rpc) is not None


def error_from_rpc(rpc: grpc.aio.AioRpcError) -> TwoTowerError:
    """The error that the other side raised; for a status that gRPC itself made, our nearest error."""
    details = rpc.details() or "no details"
    name = _name_of(rpc)
    cls = _CLASSES.get(str(name)) or _BY_CODE.get(rpc.code(), TwoTowerError)
    if name is None and rpc.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and "message larger than max" in details:
        return InvalidArgument("prompt", f"the request is too large ({details})")
    if name is None and rpc.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("the deadline passed before the answer came")
    if cls is InvalidArgument:
        field, _, problem = details.partition(": ")
        return InvalidArgument(field, problem) if problem else InvalidArgument("request", details)
    return cls(details)


def _name_of(rpc: grpc.aio.AioRpcError) -> str | None:
    metadata: Iterable[Any] = rpc.trailing_metadata() or ()  # pairs, though the stubs do not declare it
    return next((value for key, value in metadata if key == ERROR_KEY), None)
