"""What gRPC itself logs about a call, in one line: its tracebacks show only its own code, one for each bad byte of a client."""

from __future__ import annotations

import logging

MAX_LINE = 300
"""Characters; what a client sent is quoted in it."""

GRPC_LOGGERS = ("grpc._cython.cygrpc", "grpc.aio", "grpc._server")


def quiet_grpc_log() -> None:
    """Let gRPC's loggers write lines and no tracebacks, in this process. Called again, it changes nothing."""
    for name in GRPC_LOGGERS:
        logging.getLogger(name).addFilter(one_line)


def one_line(record: logging.LogRecord) -> bool:
    """Put the error of `record` into its message; everything passes."""
    message = record.getMessage()
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        message = f"{message} ({type(error).__name__}: {error})"
    record.msg, record.args = message.replace("\n", " ")[:MAX_LINE], ()
    record.exc_info = record.exc_text = record.stack_info = None
    return True
