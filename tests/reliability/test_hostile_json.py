"""Requests that are HTTP, and hostile inside."""

from __future__ import annotations

import json

import pytest

from tests.reliability.wire import Wire, head
from tests.service.servers import Running


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b'{"prompt": "\xff\xfe"}', None, None),
        (b"\xff\xfe{}", None, "invalid_json"),
        (b'{"prompt": "a\0b"}', None, "invalid_json"),
        (b'{"prompt": "x"}\0', None, "invalid_json"),
        (b'{"prompt": "\\ud800"}', "prompt", None),
        (b'{"prompt": "x", "max_tokens": NaN}', "max_tokens", None),
        (b'{"prompt": "x", "max_tokens": Infinity}', "max_tokens", None),
        (b'{"prompt": "x", "temperature": NaN}', "temperature", None),
        (b'{"prompt": "x", "temperature": -Infinity}', "temperature", None),
        (b'{"prompt": "x", "top_p": Infinity}', "top_p", None),
        (b'{"prompt": "x", "compute_budget": NaN}', "compute_budget", None),
        (b'{"prompt": "x", "compute_budget": {"target": Infinity}}', "compute_budget", None),
        (b'{"prompt": "x", "n": 1000000000}', "n", None),
        (b'{"prompt": "x", "n": -1}', "n", None),
        (b'{"prompt": "x", "best_of": 1000000000}', "best_of", None),
        (b'{"prompt": "x", "max_tokens": 1' + b"0" * 4000 + b"}", "max_tokens", None),
        (json.dumps({"prompt": "x", "stop": ["a"] * 10_000}).encode(), "stop", None),
        (json.dumps({"prompt": "x", "stop": "a" * 10_000}).encode(), "stop", None),
        (b"[" * 200_000, None, None),
        (b'{"a":' * 40_000, None, None),
        (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", None, None),
        (b'{"prompt": "x", "junk": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", None, None),
        (b'{"prompt": ' + b"[" * 100 + b"]" * 100 + b"}", "prompt", None),
    ],
)
def test_hostile_json_is_refused(server: Running, body: bytes, param: str | None, code: str | None) -> None:
    with Wire(server) as wire:
        wire.send(head(len(body)) + body)
        answer = wire.answer()
    assert answer.status == 400, answer.body[:300]
    assert (answer.error["type"], answer.error["param"], answer.error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.parametrize("prompt", ["\0", "\0" * 1000, "\u202e\ufeff\uffff", "\U0010ffff" * 100])
def test_odd_text_is_text(server: Running, prompt: str) -> None:
    answer = server.complete(prompt=prompt, max_tokens=2, ignore_eos=True)
    assert answer["usage"]["prompt_tokens"] == len(prompt.encode()) + 1


def test_odd_headers_change_nothing(server: Running) -> None:
    body = b'{"prompt": "x", "max_tokens": 2}'
    odd = b"X-Request-Id: \xff\xfe\r\nAuthorization: \xff\r\nCookie: \x80\r\n\r\n"
    with Wire(server) as wire:
        wire.send(head(len(body)).removesuffix(b"\r\n") + odd + body)
        assert wire.answer().status == 200
