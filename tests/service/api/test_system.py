from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from model.cost import CostModel
from tests.service.servers import TINY, Running


def test_the_model_is_listed_with_its_floor(server: Running) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["tiny"]
    assert listed["data"][0]["compute_floor"] == CostModel(TINY).floor
    assert server.client.get("/v1/models/tiny").json() == listed["data"][0]
    assert server.client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_is_good_while_the_engine_moves(server: Running, path: str) -> None:
    answer = server.client.get(path)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_is_bad_while_a_step_hangs(server: Running, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.context.engine, "stalled_for", lambda: 1e9)
    answer = server.client.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stalled")


def test_a_server_that_stops_is_alive_and_not_ready(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.context.engine, "_accepting", False)
    assert server.client.get("/health/live").status_code == 200
    for path in ("/health", "/health/ready"):
        answer = server.client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
        assert "retry-after" in answer.headers


def test_the_version_is_that_of_the_package(server: Running) -> None:
    assert server.client.get("/version").json() == {"version": version("rheostat")}


def test_the_tokenizer_says_which_ids_are_not_bytes(server: Running) -> None:
    info = server.client.get("/tokenizer_info").json()
    assert (info["vocab_size"], info["bos_token_id"], info["eos_token_id"]) == (257, 256, 256)
    assert info["bos_token"] is info["eos_token"] is None


def test_metrics_are_prometheus_text_of_this_server(server: Running) -> None:
    answer = server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'rheostat_model_info{model_name="tiny"} 1.0' in answer.text


def test_a_request_id_comes_back_and_a_bad_one_is_replaced(server: Running) -> None:
    def answered(given: str) -> str:
        return server.client.get("/health", headers={"x-request-id": given}).headers["x-request-id"]

    assert answered("abc-1.2_3") == "abc-1.2_3"
    assert answered("x y") != "x y"
    assert len(answered("a" * 129)) == 32


@pytest.mark.parametrize("text", ["", "plain", "é€𝄞", "\x00\n"])
def test_tokens_are_bytes_after_a_separator(server: Running, text: str) -> None:
    answer = server.client.post("/tokenize", json={"prompt": text}).json()
    assert answer["tokens"] == [256, *text.encode()]
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == server.client.get("/v1/models").json()["data"][0]["max_model_len"]
    bare = server.client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == list(text.encode())
    for tokens in (answer["tokens"], bare["tokens"]):
        assert server.client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "x" * 2001}, "prompt"), ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/detokenize", {"tokens": [257]}, "tokens"), ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"), ("/detokenize", {"tokens": [1] * 2002}, "tokens"),
    ],
)  # fmt: skip
def test_bad_tokens_are_named(server: Running, path: str, body: dict, param: str) -> None:
    answer = server.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_the_openapi_document_has_the_limits_of_the_server(server: Running) -> None:
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]

    def field(schema: str, name: str) -> dict:
        found = schemas[schema]["properties"][name]
        options = [option for option in found.get("anyOf", [found]) if option["type"] != "null"]
        return options[0] if len(options) == 1 else {option["type"]: option for option in options}

    settings = server.context.settings
    for name in ("max_tokens", "max_completion_tokens"):
        assert field("ChatRequest", name)["maximum"] == settings.max_tokens
    assert field("CompletionRequest", "max_tokens")["maximum"] == settings.max_tokens
    texts, ids, lists = (schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"][place] for place in (1, 2, 3))
    assert texts["items"]["maxLength"] == ids["maxItems"] == lists["items"]["maxItems"] == settings.max_prompt_bytes
    assert texts["maxItems"] == lists["maxItems"] == 128
    assert ids["items"]["maximum"] == lists["items"]["items"]["maximum"] == 256
    assert field("TokenizeRequest", "prompt")["maxLength"] == settings.max_prompt_bytes
    assert field("TilingsRequest", "text")["maxLength"] == settings.max_prompt_bytes
    most = field("DetokenizeRequest", "tokens")["maxItems"]
    assert most == settings.max_prompt_bytes + 1
    for first in (1, 256):
        answers = [server.client.post("/detokenize", json={"tokens": [first] + [1] * n}) for n in (most - 1, most)]
        assert [answer.status_code for answer in answers] == [200, 400]


def test_the_openapi_document_describes_every_route_and_field(server: Running) -> None:
    document = server.client.get("/openapi.json").json()
    routes = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert routes >= {
        ("post", "/v1/completions"), ("post", "/v1/chat/completions"), ("post", "/v1/tilings"), ("get", "/v1/models"),
        ("get", "/v1/models/{model}"), ("post", "/tokenize"), ("post", "/detokenize"), ("get", "/version"),
        ("get", "/health"), ("get", "/health/live"), ("get", "/health/ready"), ("get", "/metrics"),
    }  # fmt: skip
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            for parameter in operation.get("parameters", []):
                assert parameter["description"], (path, parameter["name"])
            assert "422" not in operation["responses"], "errors of validation are 400 here"
    for name, schema in document["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            assert described.get("description"), (name, field)
    schemas = document["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest", "TilingsRequest", "TokenizeRequest", "DetokenizeRequest"):
        assert schemas[name]["examples"], name
    for name, path in (("CompletionRequest", "completions"), ("ChatRequest", "chat/completions")):
        for example in schemas[name]["examples"]:
            assert server.client.post(f"/v1/{path}", json=example | {"max_tokens": 2}).status_code == 200
    for example in schemas["TilingsRequest"]["examples"]:
        assert server.client.post("/v1/tilings", json=example).status_code == 200
