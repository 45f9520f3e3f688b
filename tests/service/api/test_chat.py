from __future__ import annotations

import json
import time

import pytest

from service.api.schemas.chat import Message
from service.api.template import TURN_STOPS, render
from tests.service.servers import Running

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
RENDERED = "System: Be brief.\n\nUser: Hi\n\nAssistant: "


def chat(server: Running, **fields: object) -> dict:
    body = {"messages": MESSAGES, "temperature": 0} | fields
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(server: Running, **fields: object) -> dict:
    body = json.dumps({"messages": MESSAGES} | fields)
    answer = server.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def chunks(server: Running, **fields: object) -> list[dict]:
    body = {"messages": MESSAGES, "temperature": 0, "stream": True} | fields
    answer = server.client.post("/v1/chat/completions", json=body)
    blocks = answer.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def test_the_template_is_plain_text() -> None:
    messages = [Message(**message) for message in MESSAGES]
    assert render(messages) == RENDERED
    again = [*messages, Message(role="assistant", content="Hello."), Message(role="user", content="Bye")]
    assert render(again) == f"{RENDERED}Hello.\n\nUser: Bye\n\nAssistant: "
    assert render([Message(role="developer", content="x")]) == "System: x\n\nAssistant: "


def test_the_answer_has_openais_shape_and_is_that_of_the_rendered_prompt(server: Running) -> None:
    answer = chat(server, max_completion_tokens=20, compute_budget=0.8)
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    plain = server.complete(prompt=RENDERED, max_tokens=20, compute_budget=0.8, stop=list(TURN_STOPS))
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": plain["choices"][0]["text"], "refusal": None},
        "logprobs": None,
        "finish_reason": plain["choices"][0]["finish_reason"],
    }
    assert answer["usage"] == plain["usage"]


def test_both_names_of_the_length_are_taken_and_the_newer_wins(server: Running) -> None:
    def generated(**fields: object) -> int:
        return chat(server, ignore_eos=True, **fields)["usage"]["completion_tokens"]

    assert generated(max_tokens=3) == 3
    assert generated(max_completion_tokens=4) == 4
    assert generated(max_tokens=3, max_completion_tokens=4) == 4
    assert generated() == 200, "256, but for this server's limit"


def test_content_may_come_in_parts(server: Running) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert (
        chat(server, messages=[MESSAGES[0], {"role": "user", "content": parts}])["choices"] == chat(server)["choices"]
    )


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_an_answer_ends_where_the_next_turn_begins(
    server: Running, ignore_eos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = list(b"Yes.\n\nUser: and more of it")

    def scripted(logits: object, sequences: list) -> list[int]:
        return [script[sequence.generated % len(script)] for sequence in sequences]

    monkeypatch.setattr("service.engine.model_runner.sample", scripted)
    (choice,) = chat(server, max_completion_tokens=20, ignore_eos=ignore_eos)["choices"]
    if ignore_eos:
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Yes.\n\nUser: and more", "length")
    else:
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Yes.", "stop")


def test_characters_are_never_cut_in_a_stream(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    script = list("né€𝄞!".encode())

    def scripted(logits: object, sequences: list) -> list[int]:
        time.sleep(0.03)  # longer than text of a stream waits: most bytes would go out by themselves
        return [script[sequence.generated] for sequence in sequences]

    monkeypatch.setattr("service.engine.model_runner.sample", scripted)
    for length, expected in ((11, "né€𝄞!"), (10, "né€𝄞"), (9, "né€\ufffd")):
        streamed = chunks(server, max_completion_tokens=length)
        contents = [chunk["choices"][0]["delta"]["content"] for chunk in streamed[1:]]
        assert "".join(contents) == expected
        assert 2 <= len(contents) <= len(expected)


def test_a_stream_has_openais_chunks(server: Running) -> None:
    fields = {"max_completion_tokens": 30, "n": 2, "logprobs": True, "top_logprobs": 2, "temperature": 1.2, "seed": 4}
    whole = chat(server, **fields)
    streamed = chunks(server, **fields, stream_options={"include_usage": True})
    last = streamed.pop()
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {chunk["object"] for chunk in streamed} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in streamed}) == 1
    for choice in whole["choices"]:
        mine = [c for chunk in streamed for c in chunk["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in piece["delta"] for piece in mine[1:])
        assert "".join(piece["delta"].get("content", "") for piece in mine) == choice["message"]["content"]
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert [s for piece in mine[1:] for s in piece["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert mine[-1]["compute"] == choice["compute"]
    assert all("usage" not in chunk for chunk in chunks(server, max_completion_tokens=3))


def test_log_probabilities_of_a_message(server: Running) -> None:
    (choice,) = chat(server, max_completion_tokens=8, logprobs=True, top_logprobs=3, ignore_eos=True)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 8
    for entry in content:
        assert entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "logprob", "bytes")}
        assert len(entry["top_logprobs"]) == 3
    read = bytes(byte for entry in content for byte in entry["bytes"]).decode("utf-8", "replace")
    assert read == choice["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"), ({"messages": None}, "messages"), ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, "messages"),
        ({"messages": MESSAGES * 513}, "messages"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 201}, "max_tokens"),
        ({"max_tokens": 201, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_completion_tokens": 201}, "max_completion_tokens"), ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"), ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"echo": True}, "echo"), ({"continue_final_message": True}, "continue_final_message"),
        ({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"), ({"n": 129}, "n"),
        ({"compute_budget": 0}, "compute_budget"), ({"budget": 1}, "budget"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(server: Running, fields: dict, param: str) -> None:
    error = refused(server, **fields)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_fields_that_change_nothing_are_taken(server: Running) -> None:
    plain = chat(server, max_tokens=2)
    answer = chat(
        server, max_tokens=2, tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"],
        user="u", store=False, metadata={}, logit_bias=None, top_logprobs=None, function_call="none",
    )  # fmt: skip
    assert answer["choices"] == plain["choices"]
