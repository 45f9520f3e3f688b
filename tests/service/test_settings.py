from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.cli import main
from service.settings import ENVIRONMENT_PREFIX, Settings

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rheostat.toml"
    path.write_text('max_running = 1\nmax_waiting = 1\nport = 1\ncors_origins = ["https://a.example"]\n')
    return path


def test_options_win_over_the_environment_and_that_over_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHEOSTAT_MAX_WAITING", "2")
    monkeypatch.setenv("RHEOSTAT_PORT", "2")
    settings = Settings(settings_file=file, port=3)
    assert (settings.max_running, settings.max_waiting, settings.port, settings.max_tokens) == (1, 2, 3, 1 << 14)
    assert settings.cors_origins == ("https://a.example",)


def test_the_environment_may_name_the_file_and_an_option_another(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RHEOSTAT_SETTINGS_FILE", str(file))
    assert Settings().max_running == 1
    other = tmp_path / "other.toml"
    other.write_text("max_running = 7")
    assert Settings(settings_file=other).max_running == 7


def test_origins_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHEOSTAT_CORS_ORIGINS", "https://a.example, http://localhost:3000")
    assert Settings().cors_origins == ("https://a.example", "http://localhost:3000")


@pytest.mark.parametrize("origins", ["a.example", "https://a.example/path", "https://a.example,,x", "null"])
def test_an_origin_that_no_browser_sends_is_refused(origins: str) -> None:
    with pytest.raises(ValidationError, match="an origin reads"):
        Settings(cors_origins=origins)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_runing = 1", "unknown setting max_runing in {}; did you mean max_running?"),
        ("[table]\nx = 1", "unknown setting table in {}"),
        ('settings_file = "x"', "unknown setting settings_file in {}"),
        ("port = 70000", "port: Input should be less than or equal to 65535"),
        ("write_seconds = nan", "write_seconds: Input should be a finite number"),
        ("port =", "{} is not valid TOML: "),
        (b"\xff", "{} is not valid TOML: "),
        ("keys_file = '/nowhere'", "no keys file at /nowhere"),
        ("api_key = 'secret'", "api_key: Value should have at least 16 items"),
    ],
)
def test_a_bad_file_ends_the_start_with_one_line(
    text: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["serve", "--settings-file", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rheostat: {message.format(path)}")
    assert error.count("\n") == 1
    assert "secret" not in error


def test_an_unknown_variable_ends_the_start_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RHEOSTAT_MAX_RUNING", "1")
    assert main(["serve"]) == 2
    expected = "unknown setting RHEOSTAT_MAX_RUNING in the environment; did you mean RHEOSTAT_MAX_RUNNING?"
    assert capsys.readouterr().err == f"rheostat: {expected}\n"


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--settings-file", "/nowhere.toml"]) == 2
    assert capsys.readouterr().err == "rheostat: no settings file at /nowhere.toml\n"


def test_every_setting_has_an_option_and_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert field.description
        assert f"--{name.replace('_', '-')} " in text
        assert field.description in text


def test_a_bad_environment_does_not_disturb_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHEOSTAT_PORT", "many")
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--help"])
    assert ended.value.code == 0


def test_the_table_in_the_documentation_is_the_class() -> None:
    rows = re.findall(
        r"^\| `" + ENVIRONMENT_PREFIX + r"(\w+)` \| `--([\w-]+)` \| (.*?) \| (.*?) \|$", OPERATIONS.read_text(), re.M
    )
    documented = {name.lower(): (option, default, meaning) for name, option, default, meaning in rows}
    expected = {}
    for name, field in Settings.model_fields.items():
        default = "unset" if field.default in (None, ()) else str(field.default)
        expected[name] = (name.replace("_", "-"), "the embedded one" if name == "checkpoint" else default)
    assert {name: row[:2] for name, row in documented.items()} == expected
    for name, field in Settings.model_fields.items():
        assert documented[name][2] == field.description
