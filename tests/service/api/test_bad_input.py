from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.servers import Running

HEADERS = {"content-type": "application/json"}


def refused(server: Running, body: bytes | dict, status: int = 400, **headers: str) -> dict:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.client.post("/v1/completions", content=content, headers=HEADERS | headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize("budget", [0, -1, 2, float("nan"), float("inf"), "half", True, [], {"min": 0.5}, 10**400])
def test_a_bad_budget_is_named(server: Running, budget: object) -> None:
    assert refused(server, {"prompt": "x", "compute_budget": budget})["param"] == "compute_budget"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None), ("prompt", 1), ("prompt", []), ("prompt", [1, "x"]), ("prompt", ["x", [1]]),
        ("prompt", [257]), ("prompt", [[-1]]),
        ("prompt", [1.5]), ("prompt", ["x"] * 129), ("prompt", ["\ud800"]), ("prompt", [[True]]),
        ("prompt", [10**400]), ("prompt", "x" * 2001), ("prompt", "\ud800"),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 201), ("max_tokens", 10**30), ("max_tokens", "5"),
        ("max_tokens", 1.5), ("max_tokens", True), ("temperature", -0.1), ("temperature", 2.1),
        ("temperature", float("nan")), ("temperature", "hot"), ("top_p", 0), ("top_p", 1.01), ("seed", 2**63 + 1),
        ("seed", 0.5), ("stop", [1]), ("stop", ""), ("stop", ["x"] * 17), ("stop", "x" * 257), ("stop", "\ud800"),
        ("stream", "yes"), ("stream_options", {"include_usage": True}), ("ignore_eos", 1), ("n", 0), ("n", 10**9),
        ("n", 69), ("echo", 1), ("logprobs", 6), ("logprobs", -1), ("logprobs", True), ("best_of", 3), ("suffix", "x"),
        ("repetition_penalty", 0), ("presence_penalty", 2.1), ("frequency_penalty", float("inf")), ("top_k", -2),
        ("top_k", 1.5), ("min_p", 1.1), ("min_tokens", 1), ("response_format", {"type": "json_object"}),
        ("logit_bias", {"1": 1}), ("budget", 0.5), ("computeBudget", 0.5), ("model", 3),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(server: Running, field: str, value: object) -> None:
    error = refused(server, {"prompt": "x"} | {field: value})
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":1' + b"0" * 5000]
)
def test_a_body_that_is_no_json_object_is_refused(server: Running, body: bytes) -> None:
    refused(server, body)


def test_a_form_is_refused(server: Running) -> None:
    refused(server, b"prompt=x", **{"content-type": "application/x-www-form-urlencoded"})


def test_a_bad_budget_header_is_named(server: Running) -> None:
    for value in ("half", "0", "NaN", "[1]", "[" * 5000):
        for body in ({"prompt": "x"}, {"prompt": "x", "compute_budget": 0.5}):
            assert refused(server, body, **{"X-Compute-Budget": value})["param"] == "X-Compute-Budget"


def test_a_whole_number_is_an_integer_however_it_is_written(server: Running) -> None:
    whole = server.complete(prompt=[104, 105], max_tokens=2, seed=1, temperature=1)
    written = server.complete(prompt=[104.0, 1.05e2], max_tokens=2.0, seed=1.0, temperature=1)
    assert written["choices"] == whole["choices"]


def test_an_unknown_model_is_not_found(server: Running) -> None:
    error = refused(server, {"prompt": "x", "model": "gpt-9"}, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_a_long_body_is_refused(server: Running) -> None:
    assert refused(server, b" " * (2 << 20), 413)["code"] == "body_too_large"


def test_unknown_paths_and_methods_have_the_same_shape(server: Running) -> None:
    assert server.client.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert server.client.get("/v1/completions").json()["error"]["message"] == "Method Not Allowed"


def test_the_server_answers_after_all_this(server: Running) -> None:
    assert server.complete(prompt="still here", max_tokens=2)["usage"]["completion_tokens"] == 2


FIELDS = ["prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "compute_budget",
          "model", "n", "echo", "ignore_eos", "logit_bias", "logprobs", "top_k", "min_p", "repetition_penalty",
          "best_of", "messages", "top_logprobs", "max_completion_tokens", "tools", "text", "budgets", "rule", "tokens",
          "add_special_tokens", "x"]  # fmt: skip
NEEDED = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/tilings": {"text": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400)
@given(st.sampled_from(list(NEEDED)), st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=4), st.booleans())
def test_no_json_object_yields_a_500(shared_server: Running, path: str, fields: dict, complete: bool) -> None:
    body = (NEEDED[path] if complete else {}) | fields
    answer = shared_server.client.post(path, content=json.dumps(body), headers=HEADERS)
    assert answer.status_code in (200, 400, 404), answer.text


@settings(max_examples=50)
@given(st.binary(max_size=60))
def test_no_bytes_yield_a_500(shared_server: Running, body: bytes) -> None:
    assert shared_server.client.post("/v1/completions", content=body, headers=HEADERS).status_code == 400
