"""The one table from our errors to gRPC and HTTP status."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from twotower.errors import (
    BrokerUnavailable,
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    Draining,
    EngineStuck,
    Incompatible,
    InvalidArgument,
    LeaseLost,
    LossNotFinite,
    NonFiniteLogits,
    Overloaded,
    PortInUse,
    RequestFailed,
    ServiceFailed,
    SessionNotFound,
    TwoTowerError,
    Unavailable,
)


@dataclass(frozen=True)
class Status:
    """How an error looks from outside."""

    grpc: grpc.StatusCode
    http: int
    kind: str
    """`error.type` of the OpenAI error body."""


STATUS: dict[type[TwoTowerError], Status] = {
    TwoTowerError: Status(grpc.StatusCode.INTERNAL, 500, "server_error"),
    InvalidArgument: Status(grpc.StatusCode.INVALID_ARGUMENT, 400, "invalid_request_error"),
    CheckpointError: Status(grpc.StatusCode.FAILED_PRECONDITION, 500, "server_error"),
    ConfigError: Status(grpc.StatusCode.FAILED_PRECONDITION, 500, "server_error"),
    PortInUse: Status(grpc.StatusCode.FAILED_PRECONDITION, 500, "server_error"),
    ServiceFailed: Status(grpc.StatusCode.INTERNAL, 500, "server_error"),
    Unavailable: Status(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable"),
    BrokerUnavailable: Status(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable"),
    Draining: Status(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable"),
    Overloaded: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "rate_limit_error"),
    DeadlineExceeded: Status(grpc.StatusCode.DEADLINE_EXCEEDED, 504, "timeout_error"),
    Incompatible: Status(grpc.StatusCode.FAILED_PRECONDITION, 500, "server_error"),
    SessionNotFound: Status(grpc.StatusCode.NOT_FOUND, 404, "not_found_error"),
    LeaseLost: Status(grpc.StatusCode.ABORTED, 409, "conflict_error"),
    RequestFailed: Status(grpc.StatusCode.INTERNAL, 500, "server_error"),
    EngineStuck: Status(grpc.StatusCode.UNAVAILABLE, 503, "service_unavailable"),
    LossNotFinite: Status(grpc.StatusCode.INTERNAL, 500, "server_error"),
    NonFiniteLogits: Status(grpc.StatusCode.DATA_LOSS, 500, "server_error"),
}


def status_of(error: BaseException) -> Status:
    """The status of `error`; anything that is not ours is an internal error."""
    if isinstance(error, TwoTowerError):
        return STATUS[type(error)]
    return STATUS[TwoTowerError]
