"""Keys, rates and maxima on the routes beside completions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from service.keys import ApiKey, Keyring
from tests.service.servers import Running, serving, tiny_model

SECRET = "0123456789abcdef-"
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    limits: dict[str, dict] = {
        "people": {},
        "capped": {"maximum_budget": 0.7},
        **{name: {"requests_per_minute": 2} for name in ("choices", "mixed", "tokens")},
    }
    keys = [ApiKey(name=name, key=SecretStr(SECRET + name), **each) for name, each in limits.items()]
    with serving(tiny_model(), Keyring(keys), max_running=4) as running:
        yield running
        running.client.headers.update({"Authorization": f"Bearer {SECRET}people"})
        running.wait_until_idle()


def post(server: Running, key: str, path: str, body: dict, **headers: str) -> tuple[int, dict]:
    answer = server.client.post(path, json=body, headers={"Authorization": f"Bearer {SECRET}{key}"} | headers)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/tilings", {"text": "x"}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [120]}),
    ],
)
def test_each_route_opens_with_a_key_only(server: Running, path: str, body: dict) -> None:
    assert server.client.post(path, json=body).status_code == 401
    assert post(server, "people", path, body)[0] == 200


def test_a_maximum_holds_for_chat_in_body_and_header_and_by_default(server: Running) -> None:
    path = "/v1/chat/completions"
    for headers, fields in (({}, {"compute_budget": 0.8}), ({"X-Compute-Budget": "0.8"}, {})):
        status, answer = post(server, "capped", path, CHAT | fields, **headers)
        assert (status, answer["error"]["code"]) == (403, "budget_above_maximum")
    status, answer = post(server, "capped", path, CHAT)
    assert (status, answer["usage"]["compute"]["granted"]) == (200, 0.7)


def test_a_request_for_several_choices_counts_once(server: Running) -> None:
    body = {"prompt": "x", "n": 3, "max_tokens": 2}
    assert [post(server, "choices", "/v1/completions", body)[0] for _ in range(3)] == [200, 200, 429]


def test_a_rate_is_shared_by_the_routes_that_use_the_model(server: Running) -> None:
    asked = [("/v1/chat/completions", CHAT), ("/v1/tilings", {"text": "x"}), ("/v1/completions", {"prompt": "x"})]
    assert [post(server, "mixed", path, body)[0] for path, body in asked] == [200, 200, 429]


def test_tokens_cost_no_request(server: Running) -> None:
    assert [post(server, "tokens", "/tokenize", {"prompt": "x"})[0] for _ in range(4)] == [200] * 4


def test_the_log_line_bills_all_choices_and_analyses(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    asked = {
        "several": ("/v1/completions", {"prompt": ["x", "yy"], "n": 2, "max_tokens": 3, "ignore_eos": True}),
        "analysed": ("/v1/tilings", {"text": "a text to analyse"}),
    }
    for name, (path, body) in asked.items():
        usage = post(server, "people", path, body, **{"x-request-id": name})[1]["usage"]
        server.client.headers.update({"Authorization": f"Bearer {SECRET}people"})
        server.wait_until_idle()
        del server.client.headers["Authorization"]
        fields = [each.fields for each in caplog.records if getattr(each, "fields", {}).get("request_id") == name]
        assert len(fields) == 1
        assert fields[0]["compute"] == {field: usage["compute"][field] for field in fields[0]["compute"]}
        assert fields[0]["prompt_tokens"] == usage["prompt_tokens"]
