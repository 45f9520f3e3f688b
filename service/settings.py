"""Settings of the server, from options, environment and file.

An option of ``rheostat serve`` wins over an environment variable (prefix ``RHEOSTAT_``), which wins over the settings
file, which wins over the default. All three ways reach every setting, and an unknown name is refused in each.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from model.checkpoint import EMBEDDED_CHECKPOINT

ENVIRONMENT_PREFIX = "RHEOSTAT_"

_ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9.\-\[\]:]+")


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _as_origin(value: str) -> str:
    if not _ORIGIN.fullmatch(value):
        raise ValueError(f"an origin reads https://host or https://host:port, or is *, not {value!r}")
    return value


class Settings(BaseSettings):
    """Everything that can be set from outside. Frozen; an unknown or bad value is an error that names it."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )

    settings_file: Path | None = Field(default=None, description="TOML file with settings; not in the file itself")
    host: str = Field(default="127.0.0.1", description="address to bind to")
    port: int = Field(default=8000, ge=0, le=65535, description="port to bind to; 0 takes a free one")
    checkpoint: Path = Field(default=EMBEDDED_CHECKPOINT, description="folder with config.json and model.safetensors")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes the GPU if there is one")
    threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="threads that run the model on a CPU; as many as there are cores if unset",
    )
    max_running: int = Field(default=16, ge=1, le=4096, description="sequences that hold a state at the same time")
    max_waiting: int = Field(
        default=128, ge=0, le=1 << 20, description="sequences (choices of requests) that may queue; more get 429"
    )
    state_bytes: int | None = Field(
        default=None,
        ge=1,
        description="bytes of all states together, two at least; room for max_running whole ones if unset. Where it is "
        "short, states of requests that allow less than their target are shrunk before others have to wait",
    )
    prefill_share: float = Field(
        default=0.75,
        gt=0,
        le=1,
        description="share of the time that reading prompts may take while others generate: tokens then come at most "
        "1 / (1 - share) times as slowly, on average",
    )
    decode_stretch: float = Field(
        default=1.2,
        ge=1,
        description="how much more a step may cost than one in which all requests are as cheap as the cheapest; beyond "
        "it, the dearer ones take turns, so that each gets the same compute",
    )
    prefix_cache_bytes: int = Field(
        default=0,
        ge=0,
        le=1 << 40,
        description="bytes of states kept of prompts that were read, per API key; 0 for none",
    )
    load_patience_seconds: float = Field(
        default=0.5,
        gt=0,
        le=3600,
        description="how long a request may wait before the budgets of those that allow it are lowered",
    )
    queue_seconds: float = Field(
        default=60.0,
        gt=0,
        le=86400,
        description="how long a request may wait for its turn; then 503. One that would have to wait longer gets 429",
    )
    request_seconds: float = Field(
        default=600.0, gt=0, le=86400, description="how long a request may take in all; then 504"
    )
    max_prompt_bytes: int = Field(default=1 << 17, ge=1, le=1 << 26, description="longest prompt")
    max_tokens: int = Field(default=1 << 14, ge=1, le=1 << 24, description="most tokens that a request may ask for")
    default_budget: float = Field(default=1.0, gt=0, le=1, description="compute budget of requests that state none")
    stall_seconds: float = Field(
        default=60.0, gt=0, description="an engine step longer than this fails, and makes the server unhealthy"
    )
    shutdown_seconds: int = Field(
        default=30, ge=0, le=3600, description="how long running requests may take once the server is told to stop"
    )
    keys_file: Path | None = Field(default=None, description="TOML file with API keys; open to all if there are none")
    api_key: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="one more API key, named default; better not as an option, which ps shows",
    )
    cors_origins: Annotated[
        tuple[Annotated[str, AfterValidator(_as_origin)], ...], NoDecode, BeforeValidator(_split)
    ] = Field(default=(), description="web origins that may call the server, separated by commas; none if unset")
    max_connections: int = Field(
        default=512, ge=1, le=1 << 16, description="open connections; more take the place of idle ones, or get 503"
    )
    max_header_bytes: int = Field(
        default=1 << 15, ge=1 << 10, le=1 << 20, description="longest request line and headers together; more get 431"
    )
    max_body_bytes: int = Field(
        default=1 << 20, ge=1 << 10, le=1 << 28, description="longest request body; more get 413"
    )
    header_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="time for request line and headers to arrive; then 408"
    )
    body_seconds: float = Field(default=30.0, gt=0, le=3600, description="time for a body to arrive; then 408")
    stream_seconds: float = Field(
        default=0.02,
        ge=0,
        le=10,
        description="how long text of a stream may wait to go out with what follows; 0 for not at all. What begins or "
        "ends a stream never waits",
    )
    write_seconds: float = Field(
        default=30.0, gt=0, le=3600, description="how long a client may leave an answer unread; then it is cut off"
    )
    keep_alive_seconds: int = Field(
        default=15, ge=0, le=3600, description="how long a connection may wait for its next request"
    )
    log_format: Literal["json", "text"] = Field(default="json", description="one JSON object a line, or plain text")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Options, environment, file; unknown names in the last two are refused here."""
        del dotenv_settings, file_secret_settings
        assert isinstance(init_settings, InitSettingsSource)
        assert isinstance(env_settings, EnvSettingsSource)
        prefix = ENVIRONMENT_PREFIX.lower()
        named = [name.removeprefix(prefix) for name in env_settings.env_vars if name.startswith(prefix)]
        _refuse_unknown(named, set(cls.model_fields), "the environment", ENVIRONMENT_PREFIX)
        path = (env_settings() | init_settings()).get("settings_file")
        if path is None:
            return init_settings, env_settings
        return init_settings, env_settings, _read_file(settings_cls, Path(path))


def _read_file(settings_cls: type[BaseSettings], path: Path) -> TomlConfigSettingsSource:
    if not path.is_file():  # the source would take a missing file for an empty one
        raise FileNotFoundError(f"no settings file at {path}")
    try:
        source = TomlConfigSettingsSource(settings_cls, path)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    _refuse_unknown(source.toml_data, set(settings_cls.model_fields) - {"settings_file"}, str(path))
    return source


def _refuse_unknown(names: Iterable[str], known: set[str], where: str, prefix: str = "") -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {_written(near[0], prefix)}?" if near else ""
            raise ValueError(f"unknown setting {_written(name, prefix)} in {where}{hint}")


def _written(name: str, prefix: str) -> str:
    return prefix + name.upper() if prefix else name


def setting_options(name: str) -> dict[str, Any]:
    """Arguments for argparse's ``add_argument``, for the option of a setting. :class:`Settings` checks the values."""
    field = Settings.model_fields[name]
    shown = "the embedded one" if field.default == EMBEDDED_CHECKPOINT else field.default
    default = "" if field.default in (None, ()) else f" (default: {shown})"
    described: dict[str, Any] = {"dest": name, "help": f"{field.description}{default}".replace("%", "%%")}
    choices = getattr(field.annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return described | {"choices": choices}
    return described | {"metavar": name.rpartition("_")[2].upper()}
