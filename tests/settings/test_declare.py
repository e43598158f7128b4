from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.settings.conftest import Inner, Pot, Tray
from twotower.errors import ConfigError
from twotower.settings.build import build, environment
from twotower.settings.declare import part, setting, settings_of


def test_names_follow_from_the_declaration() -> None:
    settings = settings_of(Pot)
    assert [one.name for one in settings.values()] == [
        *("threads", "trace", "kind", "drain", "warm", "most", "memory", "redis", "guest", "key"),
    ]
    assert settings["drain_s"].option == "--drain"
    assert settings["drain_s"].variables == ("TWOTOWER_DRAIN",)
    assert settings["drain_s"].file_variable is None
    assert settings["key"].option is None
    assert settings["key"].file_variable == "TWOTOWER_KEY_FILE"
    assert settings["redis_url"].variables == ("TWOTOWER_REDIS_URL",)
    assert settings["threads"].paths == (("inner", "threads"),)


def test_a_whole_has_the_settings_of_its_parts_once() -> None:
    settings = settings_of(Tray)
    assert settings["drain_s"].paths == (("left", "drain_s"), ("right", "drain_s"))
    assert settings["threads"].paths == (("threads",),)  # its own hides theirs
    assert settings["kind"].paths == (("left", "kind"),)
    assert settings["memory"].paths == (("right", "memory"),)


def test_parts_that_mean_different_things_by_one_name() -> None:
    @dataclass(frozen=True)
    class Other:
        kind: str = setting("soup", help="another thing")

    @dataclass(frozen=True)
    class Both:
        one: Any = part(Pot)
        other: Any = part(Other)

    Both.__annotations__ = {"one": Pot, "other": Other}
    with pytest.raises(TypeError, match="its parts differ in kind"):
        settings_of(Both)


def test_a_type_that_no_setting_can_have() -> None:
    @dataclass(frozen=True)
    class Wrong:
        names: list[str] = setting(None, help="several")

    with pytest.raises(TypeError, match="cannot be"):
        settings_of(Wrong)


def test_values_reach_every_part() -> None:
    tray = build(Tray, drain_s=2.0, kind="coffee", threads=5)
    assert (tray.left.drain_s, tray.right.drain_s) == (2.0, 2.0)
    assert (tray.left.kind, tray.right.kind) == ("coffee", "tea")
    assert (tray.threads, tray.left.inner.threads) == (5, 1)
    assert build(Pot, beside=8, threads=3) == Pot(inner=Inner(3), beside=8)
    with pytest.raises(ConfigError, match=r"^sugar: no such setting$"):
        build(Pot, sugar=1)


def test_a_config_is_checked_however_it_is_made() -> None:
    with pytest.raises(ConfigError, match=r"^threads: must be at least 1, not 0$"):
        build(Pot, threads=0)
    with pytest.raises(ConfigError, match=r"^kind: must be one of tea, coffee, not 'milk'$"):
        replace(Pot(), kind="milk")
    with pytest.raises(ConfigError, match=r"^threads: must be of type int, not str$"):
        Inner(threads="3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^threads: must be of type int, not bool$"):
        Inner(threads=True)


def test_a_child_is_told_what_is_not_none() -> None:
    variables = environment(build(Pot, drain_s=0.1, warm=True, most_bytes=3000, key="k"))
    assert variables == {
        "TWOTOWER_THREADS": "1",
        "TWOTOWER_KIND": "tea",
        "TWOTOWER_DRAIN": "0.1",
        "TWOTOWER_WARM": "true",
        "TWOTOWER_MOST": "3000",
        "TWOTOWER_MEMORY": "auto",
        "TWOTOWER_REDIS_URL": "redis://here",
        "TWOTOWER_GUEST": "",
        "TWOTOWER_KEY": "k",
    }
