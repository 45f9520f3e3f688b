from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator

import pytest
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr

from model.cost import CostModel
from service.app import create_app
from service.keys import ApiKey, Keyring
from service.settings import Settings
from tests.service.servers import TINY, Running, serving, tiny_model

SECRET = "0123456789abcdef-"
OPEN = {"/health", "/health/live", "/health/ready"}


def made(name: str, **limits: object) -> ApiKey:
    return ApiKey(name=name, key=SecretStr(SECRET + name), **limits)


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRET}{name}"}


KEYS = Keyring(
    [
        made("people"),
        made("batch", default_budget=0.6, maximum_budget=0.7),
        made("capped", maximum_budget=0.8),
        made("slow", requests_per_minute=2),
        made("slower", requests_per_minute=1),
    ]
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    origins = ("https://page.example",)
    with serving(tiny_model(), KEYS, max_running=2, max_tokens=100, cors_origins=origins) as running:
        yield running
        running.client.headers.update(bearer("people"))
        running.wait_until_idle()


def complete(server: Running, key: str, **fields: object) -> dict:
    answer = server.client.post(
        "/v1/completions", json={"prompt": "x", "temperature": 0, "max_tokens": 4} | fields, headers=bearer(key)
    )
    return {"status": answer.status_code, "headers": answer.headers} | answer.json()


def routes() -> list[tuple[str, str]]:
    app = create_app(Settings(), tiny_model(), KEYS)
    return sorted((method, route.path) for route in iter_route_contexts(app.routes) for method in route.methods)


def test_there_are_routes_to_protect() -> None:
    assert {("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/health")} <= set(routes())


@pytest.mark.parametrize(("method", "path"), routes())
@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", f"Basic {SECRET}people", "Bearer x", f"Bearer {SECRET}people2", "Bearer \xe4\xff"],
)
def test_every_route_but_health_asks_for_a_key(
    server: Running, method: str, path: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    body = b"" if method == "GET" else b'{"prompt": '  # not even JSON, which without a key is nobody's business
    answer = server.client.request(method, path, headers={**headers, "Content-Type": "application/json"}, content=body)
    if path in OPEN:
        assert answer.status_code == 200
        return
    assert answer.status_code == 401
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health/../v1/models", "/v1/models?/health", "//v1/models", "/v1/models/"])
def test_no_spelling_of_a_path_goes_round_the_key(server: Running, path: str) -> None:
    for host in ("localhost", "x/health?", "localhost/health"):
        answer = server.client.get(path, headers={"Host": host})
        assert answer.status_code != 200, (path, host)


def test_a_key_opens_and_the_scheme_has_no_case(server: Running) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = {"Authorization": f"{scheme} {SECRET}people"}
        assert server.client.get("/v1/models", headers=headers).status_code == 200


def test_a_server_without_keys_is_open_and_its_schema_says_so() -> None:
    app = create_app(Settings(), tiny_model(), Keyring([]))
    assert "securitySchemes" not in app.openapi().get("components", {})
    secured = create_app(Settings(), tiny_model(), KEYS).openapi()
    assert "securitySchemes" in secured["components"]
    assert "security" in secured["paths"]["/v1/completions"]["post"]
    assert "security" not in secured["paths"]["/health"]["get"]


def test_a_key_has_a_default_budget(server: Running) -> None:
    def granted(key: str) -> tuple:
        compute = complete(server, key, prompt="x" * 200)["usage"]["compute"]
        return compute["requested"], compute["granted"], compute["reason"]

    assert granted("people") == (1.0, 1.0, "requested")
    assert granted("batch") == (0.6, 0.6, "requested")
    assert granted("capped") == (0.8, 0.8, "requested"), "the server's default is lowered to the key's maximum"


def test_a_number_above_the_maximum_is_forbidden_and_the_field_named(server: Running) -> None:
    answer = complete(server, "batch", compute_budget=0.71)
    assert answer["status"] == 403
    expected = "compute_budget: at most 0.7 may be granted here, not 0.71"
    assert answer["error"] == {
        "message": expected, "type": "permission_error", "param": "compute_budget", "code": "budget_above_maximum"
    }  # fmt: skip
    headers = bearer("batch") | {"X-Compute-Budget": "0.9"}
    error = server.client.post("/v1/completions", json={"prompt": "x"}, headers=headers).json()["error"]
    assert (error["param"], error["code"]) == ("X-Compute-Budget", "budget_above_maximum")
    assert complete(server, "batch", compute_budget=0.7)["usage"]["compute"]["granted"] == 0.7


def test_a_range_gets_the_maximum_if_its_minimum_allows_and_says_so(server: Running) -> None:
    given = complete(server, "batch", compute_budget={"target": 0.9, "min": 0.5}, prompt="budget " * 250, max_tokens=50)
    compute = given["usage"]["compute"]
    assert (compute["requested"], compute["granted"], compute["reason"]) == (0.9, 0.7, "maximum")
    assert compute["spent"] == pytest.approx(0.7, rel=0.05)
    assert complete(server, "batch", compute_budget={"target": 0.9, "min": 0.8})["status"] == 403
    assert complete(server, "batch", compute_budget={"target": 0.9})["status"] == 403


def test_a_maximum_under_the_floor_is_granted_the_floor() -> None:
    with serving(tiny_model(), Keyring([made("tiny", maximum_budget=0.01)])) as server:
        compute = complete(server, "tiny")["usage"]["compute"]
        assert (compute["requested"], compute["reason"], compute["tiles"]) == (0.01, "floor", 0)
        assert compute["granted"] > CostModel(TINY).floor - 0.1


def test_a_rate_is_kept_and_disclosed(server: Running) -> None:
    answers = [complete(server, "slow", max_tokens=1) for _ in range(3)]
    assert [answer["status"] for answer in answers] == [200, 200, 429]
    assert [answer["headers"]["x-ratelimit-limit-requests"] for answer in answers] == ["2", "2", "2"]
    assert [answer["headers"]["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert 1 <= int(answers[2]["headers"]["retry-after"]) <= 30
    assert answers[2]["error"]["code"] == "rate_limit_exceeded"
    assert answers[2]["error"]["type"] == "rate_limit_error"
    assert complete(server, "people")["status"] == 200, "another key's rate is its own"
    assert server.client.get("/v1/models", headers=bearer("slow")).status_code == 200, "no model work, not counted"
    text = server.client.get("/metrics", headers=bearer("people")).text
    assert 'rheostat_request_rejected_total{reason="rate_limit"} 1.0' in text
    assert "slow" not in text, "no label names a key"


def test_a_request_that_was_refused_for_a_bad_field_counts_too(server: Running) -> None:
    answers = [complete(server, "slower", max_tokens=0)["status"] for _ in range(2)]
    assert answers == [400, 429]


def test_only_the_configured_origin_may_read_answers(server: Running) -> None:
    for origin, allowed in (("https://page.example", True), ("https://other.example", False)):
        preflight = {
            "Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"
        }  # fmt: skip
        answer = server.client.options("/v1/completions", headers=preflight)
        assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (
            200 if allowed else 400,
            allowed,
        )
        answer = server.client.get("/health", headers={"Origin": origin})
        assert ("access-control-allow-origin" in answer.headers) == allowed


def log_line(caplog: pytest.LogCaptureFixture, request_id: str) -> dict:
    """The fields of the one line about a request; lines come a moment after answers."""

    def lines() -> list[dict]:
        return [each.fields for each in caplog.records if each.message == "request" and hasattr(each, "fields")]

    def found() -> list[dict]:
        return [fields for fields in lines() if fields["request_id"] == request_id]

    deadline = time.monotonic() + 10
    while not found():
        assert time.monotonic() < deadline, "no line was written"
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(found()) == 1
    return found()[0]


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_has_one_line_with_the_bill_and_no_text(
    server: Running, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    headers = bearer("people") | {"x-request-id": f"logged-{stream}"}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    sampling = {"max_tokens": 7, "temperature": 0, "ignore_eos": True, "compute_budget": 0.8}
    body = {"prompt": "a most private prompt", "stream": stream} | sampling | options
    text = server.client.post("/v1/completions", json=body, headers=headers).text
    last = json.loads(text.split("\n\n")[-3].removeprefix("data: ")) if stream else json.loads(text)
    fields = log_line(caplog, f"logged-{stream}")
    usage = last["usage"]
    assert (fields["method"], fields["route"], fields["status"]) == ("POST", "/v1/completions", 200)
    assert (fields["key"], fields["finish_reasons"]) == ("people", ["length"])
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (22, 7)
    assert fields["compute"] == {
        name: usage["compute"][name]
        for name in ("requested", "granted", "spent", "spent_flops", "full_flops", "reason")
    }
    assert fields["seconds"] > 0
    assert "private" not in caplog.text
    assert "private" not in json.dumps(fields)
    assert SECRET not in caplog.text


def test_the_log_names_the_route_and_not_the_path(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    asked = (
        ("/v1/models/secret-name", "/v1/models/{model}", 404),
        ("/secret-name", None, 404),
        ("/health", "/health", 200),
    )
    for number, (path, route, status) in enumerate(asked):
        server.client.get(path, headers=bearer("people") | {"x-request-id": f"route-{number}"})
        fields = log_line(caplog, f"route-{number}")
        assert (fields["route"], fields["status"]) == (route, status)
        assert "compute" not in fields
        assert "secret-name" not in json.dumps(fields)


def test_what_fails_unexpectedly_is_a_500_with_a_request_id(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("planted")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(server.context.metrics, "render", fail)
    answer = server.client.get("/metrics", headers=bearer("people") | {"x-request-id": "failed-1"})
    monkeypatch.undo()
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "failed-1"
    assert answer.json()["error"]["code"] == "internal_error"
    assert log_line(caplog, "failed-1")["status"] == 500
    assert len([each for each in caplog.records if each.exc_info]) == 1
