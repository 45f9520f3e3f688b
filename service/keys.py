"""API keys: who may ask, for how much compute, how often."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class ApiKey(BaseModel):
    """One key. Its name may stand in logs, the key itself never does."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str
    key: SecretStr = Field(min_length=16, max_length=512)
    default_budget: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    """For requests that state none; the server's default if unset."""
    maximum_budget: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    """The most that a request may be granted."""
    requests_per_minute: int | None = Field(default=None, ge=1, le=1_000_000)
    """No limit if unset."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.default_budget is not None and self.default_budget > self.maximum_budget:
            raise ValueError(f"default_budget {self.default_budget} is above maximum_budget {self.maximum_budget}")
        return self


class Keyring:
    """The keys of one server. Without any, the server is open."""

    def __init__(self, keys: list[ApiKey]) -> None:
        self._digests = [(_digest(key.key.get_secret_value().encode("utf-8")), key) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, given: bytes) -> ApiKey | None:
        """The key that a client gave, if it is one. The time does not depend on how much of which key matches."""
        digest = _digest(given)
        found = None
        for known, key in self._digests:
            if hmac.compare_digest(known, digest):
                found = key
        return found


def _digest(key: bytes) -> bytes:
    """Keys of any length compare as 32 bytes, so that the length shows no more than the content does."""
    return hashlib.sha256(key).digest()


def load_keys(path: Path | None, single: SecretStr | None) -> Keyring:
    """The keys in a TOML file (one table per key, named after it), and ``single`` under the name ``default``.

    Raises:
        ValueError: a name or value is bad, or two keys have the same name or are the same. FileNotFoundError: no file.
    """
    keys = [] if path is None else _read_keys(path)
    if single is not None:
        keys.append(ApiKey(name="default", key=single))
    for what, values in (("name", [key.name for key in keys]), ("key", [key.key.get_secret_value() for key in keys])):
        if len(set(values)) < len(values):
            raise ValueError(f"two API keys have the same {what}")
    return Keyring(keys)


def _read_keys(path: Path) -> list[ApiKey]:
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no keys file at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    if not tables:
        raise ValueError(f"{path} holds no keys; without a keys file the server is open to all")
    keys = []
    for name, table in tables.items():
        if not (_NAME.fullmatch(name) and isinstance(table, dict) and "name" not in table):
            raise ValueError(f"{path}: every key is a table, named with 1 to 64 of A-Za-z0-9._-; {name[:80]!r} is not")
        try:
            keys.append(ApiKey.model_validate(table | {"name": name, "key": _secret(table.get("key"))}))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{path}: {'.'.join([name, *map(str, first['loc'])])}: {first['msg']}") from None
    return keys


def _secret(value: object) -> object:
    return SecretStr(value) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class Allowance:
    """Whether one more request is allowed, and how many are left."""

    allowed: bool
    remaining: int
    retry_seconds: float
    """Until the next request is allowed; 0 if one is."""
    reset_seconds: float
    """Until all are."""


class RateLimiter:
    """Requests per minute and key, as a bucket that holds a minute's worth and fills evenly. For one thread.

    Memory is bounded by the number of keys.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str, per_minute: int) -> Allowance:
        """Count a request of the key ``name``, if it is allowed."""
        now = self._clock()
        level, then = self._buckets.get(name, (float(per_minute), now))
        level = min(float(per_minute), level + (now - then) * per_minute / 60.0)
        allowed = level >= 1.0
        level -= allowed
        self._buckets[name] = level, now
        seconds = 60.0 / per_minute
        retry = max(0.0, 1.0 - level) * seconds
        return Allowance(allowed, math.floor(level), retry, (per_minute - level) * seconds)
