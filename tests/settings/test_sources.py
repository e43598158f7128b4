from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.settings.conftest import Pot, Tray
from twotower.errors import ConfigError
from twotower.settings.build import build, environment
from twotower.settings.sources import Sources, load

COMMANDS = {"pot": Pot, "tray": Tray}


def _load(options: dict[str, str] | None = None, environ: dict[str, str] | None = None, file: Path | None = None) -> Pot:
    return load(Pot, "pot", COMMANDS, Sources(options or {}, environ or {}, file))


def _refused(*given: object) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(*given)  # type: ignore[arg-type]
    return str(caught.value)


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('drain = 3\nthreads = 3\nmost = "3K"\nkind = "coffee"\n[pot]\nkind = "tea"\n[tray]\nthreads = 9\n')
    found = _load({"drain": "1"}, {"TWOTOWER_DRAIN": "2", "TWOTOWER_THREADS": "2"}, file)
    assert found == build(Pot, drain_s=1.0, threads=2, most_bytes=3072, kind="tea")
    named = _load({}, {"TWOTOWER_SETTINGS": str(file)})
    assert named == build(Pot, drain_s=3.0, threads=3, most_bytes=3072, kind="tea")
    assert _load({}, {"TWOTOWER_DRAIN": ""}) == Pot()  # an empty variable says nothing


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("threads", "x", "must be a whole number, not 'x'"),
        ("threads", "1.5", "must be a whole number, not '1.5'"),
        ("threads", "0", "must be at least 1, not 0"),
        ("threads", "10", "must be at most 9, not 10"),
        ("drain", "soon", "must be a number, not 'soon'"),
        ("drain", "inf", "must be a finite number of seconds, not inf"),
        ("drain", "-1", "must be a finite number of seconds, not -1.0"),
        ("kind", "milk", "must be one of tea, coffee, not 'milk'"),
        ("warm", "perhaps", "must be true or false, not 'perhaps'"),
        ("most", "many", "must be a size such as 512M or 40G, not 'many'"),
        ("most", "0", "must be a size between a byte and an exabyte, not '0'"),
        ("memory", "much", "must be a size such as 512M or 40G, not 'much'"),
    ],
)
def test_bad_values_are_refused_by_where_they_stand(name: str, text: str, said: str, tmp_path: Path) -> None:
    assert _refused({name: text}) == f"{name}: {said}"
    assert _refused({}, {f"TWOTOWER_{name.upper()}": text}) == f"TWOTOWER_{name.upper()}: {said}"
    file = tmp_path / "settings.toml"
    file.write_text(f'{name} = "{text}"\n')
    assert _refused({}, {}, file) == f"{file}: {name}: {said}"


def test_names_that_nobody_knows(tmp_path: Path) -> None:
    assert _refused({}, {"TWOTOWER_TREADS": "2"}) == "TWOTOWER_TREADS: no such setting; did you mean TWOTOWER_THREADS?"
    file = tmp_path / "settings.toml"
    for text, said in {
        "treads = 2": "treads: no such setting; did you mean threads?",
        "[pot]\ntreads = 2": "[pot] treads: no such setting; did you mean threads?",
        "[tray]\ntreads = 2": "[tray] treads: no such setting; did you mean threads?",  # also what another one reads
        "[pots]\nthreads = 2": "[pots]: no such command; did you mean pot?",
        "pot = 2": "pot: must be a table",
        "threads = [2]": "threads: must be one value, or a list of texts",
        "threads = true": "threads: must be a whole number, not 'true'",
    }.items():
        file.write_text(text)
        assert _refused({}, {}, file) == f"{file}: {said}"
    file.write_text("threads = \n")
    assert _refused({}, {}, file).startswith(f"settings: cannot read {str(file)!r}: Invalid value")
    assert _refused({}, {}, tmp_path / "none") == f"settings: cannot read '{tmp_path}/none': No such file or directory"


def test_several_of_a_setting(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('guest = ["ann", "bob"]')
    assert _load({}, {}, file).guests == ("ann", "bob")
    assert _load({}, {"TWOTOWER_GUEST": "ann, bob,"}).guests == ("ann", "bob")
    with pytest.raises(ConfigError, match=r"^guest: must be words without commas, not \('a,b',\)$"):
        build(Pot, guests=("a,b",))


def test_variables_of_other_commands_and_of_kubernetes_are_no_mistakes() -> None:
    links = {
        "TWOTOWER_REDIS_PORT": "tcp://10.0.0.1:6379",
        "TWOTOWER_REDIS_PORT_6379_TCP_ADDR": "10.0.0.1",
        "TWOTOWER_REDIS_SERVICE_HOST": "10.0.0.1",
        "TWOTOWER_REDIS_SERVICE_PORT_REDIS": "6379",
    }
    assert _load({}, links) == Pot()


def test_a_password_is_refused_on_a_command_line_and_not_shown() -> None:
    for url in ("redis://:hush@h:1", "redis://me:hush@h", "redis://me:hu@sh@h", "unix:///x?password=hush"):
        said = _refused({"redis": url})
        assert "hush" not in said
        assert said.startswith("redis: every user of the machine can read a password on a command line; set TWOTOWER_REDIS_URL")
        assert _load({}, {"TWOTOWER_REDIS_URL": url}).redis_url == url
    assert _load({"redis": "redis://me@h:1"}).redis_url == "redis://me@h:1"


def test_a_secret_comes_from_a_file_that_holds_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sesame\n")
    assert _load({}, {"TWOTOWER_KEY_FILE": str(file)}).key == "sesame"
    both = {"TWOTOWER_KEY": "sesame", "TWOTOWER_KEY_FILE": str(file)}
    assert _refused({}, both) == "TWOTOWER_KEY_FILE: TWOTOWER_KEY is set too; leave one of them out"
    assert "TWOTOWER_KEY_FILE: cannot read" in _refused({}, {"TWOTOWER_KEY_FILE": str(tmp_path)})


@given(
    drain_s=st.floats(0, allow_infinity=False, allow_nan=False),
    threads=st.integers(1, 9),
    warm=st.booleans(),
    most_bytes=st.none() | st.integers(1, 1 << 50),
    guests=st.lists(st.text("abc:/* ", min_size=1).map(str.strip).filter(bool)).map(tuple),
    trace=st.none() | st.text("abc/é '\"=", min_size=1).map(Path),
)
def test_a_child_reads_what_its_parent_wrote(**values: object) -> None:
    config = build(Pot, **values)
    assert load(Pot, "pot", COMMANDS, Sources({}, environment(config))) == config
    assert math.isfinite(config.drain_s)
