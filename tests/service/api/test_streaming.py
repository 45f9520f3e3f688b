from __future__ import annotations

import json

import pytest

from tests.service.servers import Running


def events(server: Running, **fields: object) -> list[dict]:
    body = {"prompt": "x", "temperature": 0, "stream": True} | fields
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(answer.iter_text()).split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


@pytest.mark.parametrize("include_usage", [False, True])
def test_the_stream_is_the_answer_in_pieces(server: Running, include_usage: bool) -> None:
    whole = server.complete(max_tokens=30)
    chunks = events(server, max_tokens=30, stream_options={"include_usage": include_usage})
    if include_usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_an_empty_text_still_has_a_chunk(server: Running) -> None:
    first = server.complete(max_tokens=1)["choices"][0]["text"]
    chunks = events(server, max_tokens=20, stop=first)
    assert [chunk["choices"][0] for chunk in chunks] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    ]


def test_a_refused_stream_has_a_status_and_no_events(server: Running) -> None:
    answer = server.client.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": -1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"
