"""The catalogue of errors: the classes of `errors.py`, and what `status.py` makes of them."""

from __future__ import annotations

import inspect

import grpc

from twotower.errors import TwoTowerError
from twotower.status import STATUS

RETRIED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
"""Codes that say that the same request may succeed later."""

_HEAD = """# Errors

Generated from `services/twotower/errors.py` and `services/twotower/status.py` by `make docs`; do not edit.

Every error that a user can meet is one of these classes. The command line prints it as one line, `error: ...`, and exits
with 1. The services answer with its status:

- **gRPC**: the status code below, the message as details, and trailing metadata `twotower-error` with the name of the class.
- **HTTP**: the status below, and OpenAI's body, `{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}`. `param`
  names the field of an `InvalidArgument`.

"Again" says whether the same request may succeed later; HTTP then names a number of seconds in `Retry-After`, and gRPC, for
`Overloaded`, in the trailing metadata `retry-after-s`. An exception that is not in this table is a defect of ours, and is
answered as `TwoTowerError` is.

| Error | Is a | gRPC | HTTP | `type` | Again | Meaning |
|---|---|---|---|---|---|---|
"""


def errors_page() -> str:
    """The page, as Markdown."""
    return _HEAD + "".join(f"{_row(cls)}\n" for cls in STATUS)


def _row(cls: type[TwoTowerError]) -> str:
    status = STATUS[cls]
    parent = cls.__bases__[0]
    above = f"`{parent.__name__}`" if issubclass(parent, TwoTowerError) else ""
    again = "yes" if status.grpc in RETRIED else "no"
    meaning = " ".join((inspect.getdoc(cls) or "").split())
    return f"| `{cls.__name__}` | {above} | `{status.grpc.name}` | {status.http} | `{status.kind}` | {again} | {meaning} |"
