"""A service whose settings are of all kinds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from twotower.settings.declare import Secret, part, setting
from twotower.settings.values import check


@dataclass(frozen=True, slots=True)
class Inner:
    threads: int = setting(1, least=1, most=9, help="threads")
    trace: Path | None = setting(None, help="where")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class Pot:
    inner: Inner = part(Inner)
    kind: str = setting("tea", choices=("tea", "coffee"), help="what is in it")
    drain_s: float = setting(30.0, unit="s", help="seconds")
    warm: bool = setting(False, help="whether")
    most_bytes: int | None = setting(None, unit="bytes", least=1, help="room")
    memory: str = setting("auto", unit="bytes", words=("auto", "0"), help="room")
    redis_url: str = setting("redis://here", name="redis", variables=("TWOTOWER_REDIS_URL",), secret=Secret.PASSWORD, help="x")
    guests: tuple[str, ...] = setting((), name="guest", help="who comes")
    key: str | None = setting(None, secret=Secret.ALL, help="opens it")
    beside: int = 7

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class Tray:
    threads: int | None = setting(None, help="of all", otherwise="one each")
    left: Pot = part(Pot, "left", without=("memory",))
    right: Pot = part(Pot, "right", without=("kind",))


@pytest.fixture
def pot() -> type[Pot]:
    return Pot


@pytest.fixture
def tray() -> type[Tray]:
    return Tray
