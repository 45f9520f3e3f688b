from __future__ import annotations

import hmac
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.keys import ApiKey, Keyring, RateLimiter, load_keys

LONG = "0123456789abcdef"

FILE = f"""
[batch]
key = "{LONG}-batch"
default_budget = 0.3
maximum_budget = 0.5
requests_per_minute = 60

[people]
key = "{LONG}-päople"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_keys_come_from_a_file_and_a_setting(path: Path) -> None:
    path.write_text(FILE, "utf-8")
    keys = load_keys(path, SecretStr(f"{LONG}-single"))
    assert len(keys) == 3
    batch = keys.find(f"{LONG}-batch".encode())
    assert batch is not None
    assert (batch.name, batch.default_budget, batch.maximum_budget, batch.requests_per_minute) == (
        "batch",
        0.3,
        0.5,
        60,
    )
    people, single = keys.find(f"{LONG}-päople".encode()), keys.find(f"{LONG}-single".encode())
    assert people is not None
    assert single is not None
    assert (people.name, people.maximum_budget, people.requests_per_minute) == ("people", 1.0, None)
    assert single.name == "default"


@pytest.mark.parametrize("given", [b"", b"\xff\0", LONG.encode(), f"{LONG}-batch ".encode(), b"x" * 100_000])
def test_what_is_no_key_is_not_found(path: Path, given: bytes) -> None:
    path.write_text(FILE, "utf-8")
    assert load_keys(path, None).find(given) is None


def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keyring([ApiKey(name=name, key=SecretStr(f"{LONG}-{name}")) for name in "abc"])
    compared: list[tuple[int, int]] = []
    original = hmac.compare_digest

    def counting(first: bytes, second: bytes) -> bool:
        compared.append((len(first), len(second)))
        return original(first, second)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    for given in (f"{LONG}-a", f"{LONG}-c", "x"):
        compared.clear()
        keys.find(given.encode())
        assert compared == [(32, 32)] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys"),
        ("x = 1", "every key is a table"),
        (f'["a b"]\nkey = "{LONG}"', "every key is a table, named"),
        ("[a]", "a.key: Input should be"),
        ('[a]\nkey = "short"', "a.key: Value should have at least 16"),
        (f'[a]\nkey = "{LONG}"\nmax_budget = 1', "a.max_budget: Extra inputs are not permitted"),
        (f'[a]\nkey = "{LONG}"\nmaximum_budget = 0', "a.maximum_budget: Input should be greater than 0"),
        (f'[a]\nkey = "{LONG}"\nrequests_per_minute = 0', "a.requests_per_minute: "),
        (f'[a]\nkey = "{LONG}"\nrequests_per_minute = "9"', "a.requests_per_minute: "),
        (
            f'[a]\nkey = "{LONG}"\ndefault_budget = 0.6\nmaximum_budget = 0.5',
            "0.6 is above maximum",
        ),
        (f'[a]\nkey = "{LONG}"\n[b]\nkey = "{LONG}"', "two API keys have the same key"),
        (f'[default]\nkey = "{LONG}-2"', "two API keys have the same name"),
        ("[a", "is not valid TOML"),
    ],
)
def test_a_bad_file_is_refused_and_shows_no_key(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_keys(path, SecretStr(f"{LONG}-single"))
    assert LONG not in str(error.value)
    assert "short" not in str(error.value)


def test_no_repr_shows_a_key() -> None:
    assert LONG not in repr(ApiKey(name="a", key=SecretStr(LONG)))


def test_a_bucket_holds_a_minute_and_fills_evenly() -> None:
    now = 100.0
    limiter = RateLimiter(lambda: now)
    allowances = [limiter.take("a", 3) for _ in range(4)]
    assert [allowance.allowed for allowance in allowances] == [True, True, True, False]
    assert [allowance.remaining for allowance in allowances] == [2, 1, 0, 0]
    assert allowances[3].retry_seconds == pytest.approx(20)
    assert allowances[3].reset_seconds == pytest.approx(60)
    assert limiter.take("b", 3).allowed, "keys do not share"
    now += 19.9
    assert not limiter.take("a", 3).allowed
    now += 0.2
    assert limiter.take("a", 3).allowed
    assert not limiter.take("a", 3).allowed
    now += 1e6
    assert [limiter.take("a", 3).allowed for _ in range(4)] == [True, True, True, False]
