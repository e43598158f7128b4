"""The table of errors is complete."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from twotower import errors
from twotower.errors import TwoTowerError
from twotower.status import STATUS, status_of


def subclasses(cls: type[TwoTowerError]) -> Iterator[type[TwoTowerError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from subclasses(sub)


def test_every_error_has_its_row() -> None:
    ours = {cls for cls in subclasses(TwoTowerError) if cls.__module__.startswith("twotower")}
    assert ours == set(STATUS)


def test_every_error_is_in_the_picture() -> None:
    assert errors.__doc__ is not None
    for cls in STATUS:
        assert cls.__name__ in errors.__doc__


def test_rows_make_sense() -> None:
    for cls, status in STATUS.items():
        assert status.grpc is not grpc.StatusCode.OK
        assert 400 <= status.http < 600, cls
        assert status.kind.endswith("_error") or status.kind == "service_unavailable"


def test_what_is_not_ours_is_internal() -> None:
    assert status_of(ValueError("x")) is STATUS[TwoTowerError]
