"""The services' settings as users give them: options, variables, files; what is wrong is one line that names it."""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import twotower
from twotower.cli import configuration
from twotower.cli.commands import SERVICES, read
from twotower.cli.main import build_parser, main
from twotower.context.config import ContextConfig
from twotower.denoiser.config import DenoiserConfig
from twotower.errors import ConfigError, TwoTowerError
from twotower.gateway.config import GatewayConfig
from twotower.launcher.config import UpConfig, on_free_ports
from twotower.service.config import ServiceConfig, TowerConfig
from twotower.settings.build import build, environment
from twotower.settings.declare import Declaration, settings_of
from twotower.settings.sources import Sources, load

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("TWOTOWER_"):
            monkeypatch.delenv(name)


def _read(config: type, *words: str) -> Any:
    command = next(name for name, known in SERVICES.items() if known is config)
    return read(config, command, build_parser().parse_args([command, *words]))


def test_the_reference_page_is_what_the_declarations_say() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration.page(), "run `python -m twotower.cli.configuration`"


@pytest.mark.parametrize("config", SERVICES.values())
def test_defaults_without_anything(config: type) -> None:
    assert _read(config) == config()


@pytest.mark.parametrize("config", SERVICES.values())
def test_every_setting_has_an_option_or_is_a_secret_and_a_variable(config: type) -> None:
    names = {action.dest for action in build_parser()._subparsers._group_actions[0].choices[_name(config)]._actions}  # type: ignore[union-attr,index]
    for setting in settings_of(config).values():
        assert (setting.name in names) == (setting.option is not None)
        assert all(variable.startswith("TWOTOWER_") for variable in setting.variables)
        assert setting.about.help


def _name(config: type) -> str:
    return next(name for name, known in SERVICES.items() if known is config)


OTHER = {
    "checkpoint": Path("/some where"),
    "redis_url": "redis://:pass@host:1",
    "transport": "shm",
    "dtype": "bfloat16",
    "experts": "fp8",
    "context_experts": "fp4",
    "state_memory": "3G",
    "prefix_memory": "0",
    "prefix_redis_memory": "5M",
    "turns": Path("/turns"),
    "trace": Path("traces"),
    "scale_fill": 0.5,
}


def _another(kind: type, default: Any) -> Any:
    if kind is bool:
        return not default
    if kind in (int, float):
        return kind((default or 0) + 3)
    return ("one", "another") if kind is tuple else "another"


@pytest.mark.parametrize("config", [GatewayConfig, ContextConfig, DenoiserConfig])
def test_a_service_reads_from_its_environment_what_the_launcher_wrote(config: type) -> None:
    """Each setting at another value than its default, so that none is lost on the way."""
    values = {name: OTHER.get(name, _another(one.kind, one.default)) for name, one in settings_of(config).items()}
    given: Any = build(config, **values)
    for setting in settings_of(config).values():
        assert setting.of(given) != setting.default, setting.name
    assert load(config, _name(config), SERVICES, Sources({}, environment(given))) == given


def test_a_stack_gives_its_services_what_was_given_to_it() -> None:
    up = _read(
        UpConfig,
        *("--contexts", "3", "--denoisers", "2", "--threads", "5", "--experts", "fp4", "--context-experts", "fp8"),
        *(
            "--max-sessions",
            "7",
            "--slots",
            "2",
            "--host",
            "0.0.0.0",
            "--drain",
            "4.5",
            "--kernels",
            "torch",
            "--max-body",
            "2M",
        ),
    )
    assert (up.contexts, up.denoisers) == (3, 2)
    assert (up.gateway.max_in_flight, up.gateway.context_experts, up.gateway.max_body_bytes) == (21, "fp8", 2 << 20)
    assert (up.context.tower.experts, up.denoiser.tower.experts, up.denoiser.context_experts) == ("fp8", "fp4", "fp8")
    assert (up.context.tower.threads, up.denoiser.tower.threads) == (5, 5)
    assert {config.service.drain_s for config in (up.gateway, up.context, up.denoiser)} == {4.5}
    assert {config.tower.kernels for config in (up.context, up.denoiser)} == {"torch"}
    assert up.gateway.service.host == "0.0.0.0"
    assert up.context.service.host == up.denoiser.service.host == "127.0.0.1"
    assert (up.context.max_sessions, up.denoiser.slots) == (7, 2)
    assert replace(up, contexts=2).gateway.max_in_flight == 14
    assert _read(UpConfig, "--experts", "fp8").gateway.context_experts == "fp8"
    assert on_free_ports(Path("x"), max_sessions=9).context.max_sessions == 9


def test_a_setting_comes_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('slots = 4\nmax-waiting = 9\nredis = "redis://:secret@h"\n[denoiser]\nslots = 5\n')
    monkeypatch.setenv("TWOTOWER_MAX_SESSIONS", "3")
    assert _read(UpConfig, "--settings", str(file)).denoiser.slots == 4
    monkeypatch.setenv("TWOTOWER_SETTINGS", str(file))
    assert _read(DenoiserConfig).slots == 5
    assert _read(DenoiserConfig, "--slots", "6").slots == 6
    context = _read(ContextConfig)
    assert (context.max_sessions, context.max_waiting, context.service.redis_url) == (3, 9, "redis://:secret@h")


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ("up --denoisers x", {}, "denoisers: must be a whole number, not 'x'"),
        ("up --dtype int8", {}, "dtype: must be one of auto, float32, bfloat16, not 'int8'"),
        ("up --state-memory much", {}, "state_memory: must be a size such as 512M or 40G, not 'much'"),
        ("up", {"TWOTOWER_HTTP_PORT": "70000"}, "TWOTOWER_HTTP_PORT: must be at most 65535, not 70000"),
        ("up", {"TWOTOWER_DENOISER": "3"}, "TWOTOWER_DENOISER: no such setting; did you mean TWOTOWER_DENOISERS?"),
        ("gateway", {"TWOTOWER_DRAIN": "long"}, "TWOTOWER_DRAIN: must be a number, not 'long'"),
        ("gateway", {"TWOTOWER_SLOT": "1"}, "TWOTOWER_SLOT: no such setting; did you mean TWOTOWER_SLOTS?"),
        ("context", {"TWOTOWER_SETTINGS": "/none"}, "settings: cannot read '/none': No such file or directory"),
        (
            "context",
            {"TWOTOWER_PORT": "tcp://10.0.0.1:50051"},
            "TWOTOWER_PORT: 'tcp://10.0.0.1:50051' is a port as Kubernetes announces services; set enableServiceLinks: false",
        ),
        ("generate x --local --dtype int8", {}, "dtype: must be one of auto, float32, bfloat16, not 'int8'"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: str, variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(words.split()) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"error: {said}\n")


def test_an_option_that_is_none_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["up", "--denoiser", "3"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --denoiser 3 (see `twotower up --help`)\n"


def test_a_password_on_a_command_line_is_refused_unseen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--redis", "redis://:hush@127.0.0.1:1"]) == 1
    said = capsys.readouterr().err
    assert "TWOTOWER_REDIS_URL_FILE" in said
    assert "hush" not in said


def test_help_imports_nothing_heavy() -> None:
    """Start-up is what an import costs; this is what keeps it short."""
    code = (
        "import sys\nfrom twotower.cli.main import main\n"
        "try: main(['up', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'grpc', 'redis', 'numpy', 'starlette', 'tomllib', 'difflib'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "--http-port P" in result.stdout


def test_every_declared_class_refuses_bad_values_however_it_is_made() -> None:
    """No class of settings has forgotten to check what it declares."""
    found = set()
    for module in pkgutil.walk_packages(twotower.__path__, "twotower."):
        if module.name.endswith(".config"):
            classes = vars(importlib.import_module(module.name)).values()
            found |= {one for one in classes if isinstance(one, type) and hasattr(one, "__dataclass_fields__")}
    declared = {
        one
        for one in found
        if any(isinstance(field.metadata.get("about"), Declaration) for field in one.__dataclass_fields__.values())
    }
    assert declared == {UpConfig, GatewayConfig, ContextConfig, DenoiserConfig, ServiceConfig, TowerConfig}
    for config in declared:
        own = next(name for name, one in config.__dataclass_fields__.items() if "about" in one.metadata)
        with pytest.raises(ConfigError, match=settings_of(config)[own].name):
            config(**{own: object()})


def test_debug_can_be_a_variable_which_is_how_services_of_a_stack_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ["conformance", str(tmp_path / "none")]
    assert main(words) == 1
    monkeypatch.setenv("TWOTOWER_DEBUG", "true")
    with pytest.raises(TwoTowerError):
        main(words)
    assert on_free_ports(tmp_path, debug=True).debug
