from __future__ import annotations

import json
import socket
import time
from collections import defaultdict

import pytest

from service.engine.model_runner import ModelRunner
from tests.service.servers import Running, serving, tiny_model


def events(server: Running, path: str = "/v1/completions", **fields: object) -> list[dict]:
    answer = server.client.post(path, json={"temperature": 0, "stream": True} | fields)
    blocks = answer.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def test_prompts_come_in_four_forms(server: Running) -> None:
    ids = [list(b"one"), list(b"two")]
    single = [server.complete(prompt=text)["choices"][0]["text"] for text in ("one", "two")]
    listed = [choice["text"] for choice in server.complete(prompt=["one", "two"])["choices"]]
    assert listed == single
    assert [choice["text"] for choice in server.complete(prompt=ids)["choices"]] == single
    assert server.complete(prompt=ids[0])["choices"][0]["text"] == single[0]
    assert server.complete(prompt=[256, *ids[0]])["choices"][0]["text"] == single[0]
    assert server.complete(prompt=["one"])["choices"][0]["text"] == single[0]


def test_choices_of_a_prompt_differ_by_their_seed_and_repeat_with_it(server: Running) -> None:
    fields = {"prompt": ["one", "two"], "n": 3, "temperature": 1.5, "max_tokens": 30, "ignore_eos": True}
    answer = server.complete(**fields, seed=5)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    texts = [choice["text"] for choice in choices]
    assert len(set(texts)) == 6
    alone = [
        server.complete(**fields | {"prompt": prompt, "n": 1}, seed=5 + choice)["choices"][0]["text"]
        for prompt in ("one", "two")
        for choice in range(3)
    ]
    assert texts == alone
    assert [choice["text"] for choice in server.complete(**fields, best_of=3, seed=5)["choices"]] == texts
    assert len({choice["text"] for choice in server.complete(**fields)["choices"]}) == 6


@pytest.mark.parametrize("budget", [1.0, 0.7, 0.01])
def test_usage_is_the_sum_of_the_choices_and_of_the_counters(server: Running, budget: float) -> None:
    names = ["prompt_tokens_total", "generation_tokens_total", "compute_flops_total", "compute_full_flops_total"]
    before = [server.metric(f"rheostat_{name}") for name in names]
    answer = server.complete(prompt=["one", "a longer one"], n=2, max_tokens=9, compute_budget=budget, ignore_eos=True)
    grown = [server.metric(f"rheostat_{name}") - value for name, value in zip(names, before, strict=True)]
    usage, bills = answer["usage"], [choice["compute"] for choice in answer["choices"]]
    compute = usage["compute"]
    assert grown == [
        usage["prompt_tokens"], usage["completion_tokens"], compute["spent_flops"], compute["full_flops"]
    ]  # fmt: skip
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4 + 13, 36)
    for name in ("spent_flops", "full_flops", "tiles"):
        assert compute[name] == sum(bill[name] for bill in bills)
    assert compute["spent"] == compute["spent_flops"] / compute["full_flops"]
    assert {bill["requested"] for bill in bills} == {budget}


def test_a_single_choice_has_its_bill_in_the_usage_only(server: Running) -> None:
    assert "compute" not in server.complete()["choices"][0]


def test_choices_stream_side_by_side_and_end_once_each(server: Running) -> None:
    fields = {"prompt": ["one", "two"], "n": 2, "max_tokens": 20, "seed": 1, "temperature": 1.2}
    whole = server.complete(**fields)
    chunks = events(server, **fields, stream_options={"include_usage": True})
    last = chunks.pop()
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    texts, ends = defaultdict(str), defaultdict(list)
    for chunk in chunks:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]].append((choice["finish_reason"], choice["compute"]))
        else:
            assert "compute" not in choice
    for choice in whole["choices"]:
        assert texts[choice["index"]] == choice["text"]
        assert ends[choice["index"]] == [(choice["finish_reason"], choice["compute"])]


@pytest.mark.parametrize("stream", [False, True])
def test_one_choice_that_fails_ends_them_all(server: Running, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fork, calls = ModelRunner.fork, []

    def fail_second(self: ModelRunner, sequence: object) -> object:
        calls.append(sequence)
        if len(calls) == 2:
            raise RuntimeError("planted")
        return fork(self, sequence)

    monkeypatch.setattr(ModelRunner, "fork", fail_second)
    body = {"prompt": "x", "n": 4, "max_tokens": 200, "ignore_eos": True, "stream": stream}
    answer = server.client.post("/v1/completions", json=body)
    if stream:
        blocks = answer.text.split("\n\n")
        assert json.loads(blocks[-3].removeprefix("data: "))["error"]["code"] == "internal_error"
        assert blocks[-2:] == ["data: [DONE]", ""]
        assert answer.text.count('"error"') == 1
    else:
        assert answer.status_code == 500
    server.wait_until_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_every_choice(stream: bool) -> None:
    with serving(tiny_model(), max_running=2) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = {"prompt": ["x", "y"], "n": 2, "max_tokens": 16_000, "ignore_eos": True, "stream": stream}
        content = json.dumps(body).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            gauges = ("rheostat_num_requests_running", "rheostat_num_requests_waiting")
            deadline = time.monotonic() + 20
            while [server.metric(gauge) for gauge in gauges] != [2, 2]:
                assert time.monotonic() < deadline
                time.sleep(0.005)
        server.wait_until_idle()
        assert 'finished_reason="abort"} 4.0' in server.client.get("/metrics").text


def test_choices_that_do_not_fit_are_refused_together() -> None:
    with serving(tiny_model(), max_running=1, max_waiting=2) as server:
        refused = server.client.post("/v1/completions", json={"prompt": "x", "n": 4})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        refused = server.client.post("/v1/completions", json={"prompt": ["x"] * 4})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
        assert len(server.complete(n=3)["choices"]) == 3
        server.wait_until_idle()


def test_echo_puts_the_prompt_before_the_text(server: Running) -> None:
    text = server.complete(prompt="héllo", max_tokens=20)["choices"][0]["text"]
    assert server.complete(prompt="héllo", max_tokens=20, echo=True)["choices"][0]["text"] == "héllo" + text
    only = server.complete(prompt="héllo", max_tokens=0, echo=True)
    assert (only["choices"][0]["text"], only["choices"][0]["finish_reason"]) == ("héllo", "length")
    assert only["usage"]["completion_tokens"] == 0
    streamed = events(server, prompt="héllo", max_tokens=20, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == "héllo" + text
    assert events(server, prompt="héllo", max_tokens=0, echo=True)[0]["choices"][0]["text"] == "héllo"


def test_a_stop_string_in_the_echoed_prompt_stops_nothing(server: Running) -> None:
    answer = server.complete(prompt="stop here", stop="stop", max_tokens=5, echo=True, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_prompt_of_ids_may_end_inside_a_character(server: Running) -> None:
    text = server.complete(prompt=[0xC3], max_tokens=0, echo=True)["choices"][0]["text"]
    assert text == "\ufffd"


@pytest.mark.parametrize("field", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}])
def test_narrow_draws_are_greedy(server: Running, field: dict[str, float]) -> None:
    greedy = server.complete(max_tokens=30, ignore_eos=True)["choices"][0]["text"]
    drawn = server.complete(max_tokens=30, ignore_eos=True, temperature=1.5, seed=3, **field)["choices"][0]["text"]
    assert drawn == greedy


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_change_the_text_and_repeat(server: Running, field: str) -> None:
    fields = {"max_tokens": 60, "ignore_eos": True, "temperature": 1.0, "seed": 1}
    plain = server.complete(**fields)["choices"][0]["text"]
    first, second = (server.complete(**fields, **{field: 2.0}) for _ in range(2))
    assert first["choices"] == second["choices"]
    assert first["choices"][0]["text"] != plain
