"""gRPC's own log records in one line each: its tracebacks show only its own code, and any bad message could cause one."""

from __future__ import annotations

import logging

MAX_LINE = 300
"""The most characters of a line, which may quote what a client sent."""

GRPC_LOGGERS = ("grpc._cython.cygrpc", "grpc.aio", "grpc._server")


def quiet_grpc_log() -> None:
    """Make gRPC's loggers in this process write lines without tracebacks. A second call changes nothing."""
    for name in GRPC_LOGGERS:
        logging.getLogger(name).addFilter(one_line)


def one_line(record: logging.LogRecord) -> bool:
    """A log filter that moves the error of `record` into its message, and lets every record pass."""
    message = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        message = f"{message} ({type(error).__name__}: {error})"
    record.msg, record.args = message.replace("\n", " ")[:MAX_LINE], ()
    record.exc_info = record.exc_text = record.stack_info = None
    return True
