"""Queues, clients that leave, engines that fail, servers that stop."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.engine.model_runner import ModelRunner
from tests.service.servers import Running, serving, tiny_model

LONG = {"prompt": "x", "max_tokens": 1_000_000, "ignore_eos": True}
"""Longer than any test waits, on any machine."""


@pytest.fixture
def server() -> Iterator[Running]:
    with serving(tiny_model(), max_tokens=LONG["max_tokens"], max_running=1, max_waiting=1) as running:
        yield running


def wait_for(server: Running, metric: str, value: float) -> None:
    deadline = time.monotonic() + 20
    while server.metric(metric) != value:
        assert time.monotonic() < deadline, f"{metric} is {server.metric(metric)}, not {value}"
        time.sleep(0.005)


def begin(server: Running, **fields: object) -> socket.socket:
    """Send a request on a connection of its own, and do not wait for the answer."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | fields).encode()
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_back_its_slot_running_or_waiting(server: Running, stream: bool) -> None:
    running = begin(server, stream=stream)
    wait_for(server, "rheostat_num_requests_running", 1)
    waiting = begin(server, stream=stream)
    wait_for(server, "rheostat_num_requests_waiting", 1)
    waiting.close()
    wait_for(server, "rheostat_num_requests_waiting", 0)
    running.close()
    wait_for(server, "rheostat_num_requests_running", 0)
    server.wait_until_idle()
    assert server.metric("rheostat_generation_tokens_total") < LONG["max_tokens"]
    assert 'finished_reason="abort"} 2.0' in server.client.get("/metrics").text


def test_a_full_queue_answers_429_with_retry_after_and_recovers(server: Running) -> None:
    connections = [begin(server)]
    wait_for(server, "rheostat_num_requests_running", 1)
    connections.append(begin(server))
    wait_for(server, "rheostat_num_requests_waiting", 1)
    for stream in (False, True):
        answer = server.client.post("/v1/completions", json={"prompt": "x", "stream": stream})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert server.metric("rheostat_request_rejected_total") == 2
    for connection in connections:
        connection.close()
    server.wait_until_idle()
    assert server.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_step_is_a_500_for_its_request_and_the_engine_lives(
    server: Running, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(ModelRunner, "decode", fail)
    answer = server.client.post("/v1/completions", json={"prompt": "x", "stream": stream, "ignore_eos": True})
    if stream:
        blocks = answer.text.split("\n\n")
        assert json.loads(blocks[-3].removeprefix("data: "))["error"]["type"] == "server_error"
        assert blocks[-2:] == ["data: [DONE]", ""]
    else:
        assert answer.status_code == 500
        assert "planted" not in answer.text
    monkeypatch.undo()
    server.wait_until_idle()
    assert server.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


def test_a_server_that_stops_finishes_what_runs() -> None:
    answers: list[httpx.Response] = []
    with serving(tiny_model(), max_tokens=LONG["max_tokens"]) as server:

        def ask() -> None:
            body = {"prompt": "x", "max_tokens": 300, "ignore_eos": True}
            answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(server, "rheostat_num_requests_running", 1)
    asking.join()
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 300


@pytest.mark.parametrize("stream", [False, True])
def test_what_has_not_finished_when_a_server_stops_gets_an_error(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if a step takes longer than the whole of their time."""
    decode = ModelRunner.decode

    def slow(self: ModelRunner, *arguments: Any) -> Any:
        time.sleep(1.5)
        return decode(self, *arguments)

    monkeypatch.setattr(ModelRunner, "decode", slow)
    answers: list[httpx.Response] = []
    with serving(tiny_model(), max_tokens=LONG["max_tokens"], shutdown_seconds=1) as server:

        def ask() -> None:
            answers.append(httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": stream}, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(server, "rheostat_num_requests_running", 1)
    asking.join()
    if stream:
        blocks = answers[0].text.split("\n\n")
        assert json.loads(blocks[-3].removeprefix("data: "))["error"]["code"] == "stopping"
        assert blocks[-2:] == ["data: [DONE]", ""]
    else:
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "stopping")
        assert "retry-after" in answers[0].headers


@pytest.mark.parametrize("stream", [False, True])
def test_what_waits_or_runs_for_too_long_gets_an_error(stream: bool) -> None:
    with serving(
        tiny_model(), max_tokens=LONG["max_tokens"], max_running=1, queue_seconds=0.3, request_seconds=3.0
    ) as server:
        running = threading.Thread(target=lambda: codes.append(error_code(server, stream)))
        codes: list[str] = []
        running.start()
        wait_for(server, "rheostat_num_requests_running", 1)
        assert error_code(server, stream) == "queue_timeout"
        running.join()
        assert codes == ["timeout"]
        server.wait_until_idle()
        assert server.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


def error_code(server: Running, stream: bool) -> str:
    """Of a request that cannot be answered in time."""
    answer = httpx.post(f"{server.url}/v1/completions", json=LONG | {"stream": stream}, timeout=60)
    if stream:
        return json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))["error"]["code"]
    assert answer.status_code in (503, 504)
    return answer.json()["error"]["code"]


def test_ranges_are_lowered_while_others_wait_and_fixed_budgets_are_not() -> None:
    with serving(tiny_model(), max_tokens=LONG["max_tokens"], max_running=1, load_patience_seconds=0.05) as server:
        running = begin(server)
        wait_for(server, "rheostat_num_requests_running", 1)
        computes: list[dict] = []

        def ask(budget: object) -> None:
            body = {"prompt": "x", "max_tokens": 50, "ignore_eos": True, "compute_budget": budget}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            computes.append(answer.json()["usage"]["compute"])

        asking = [threading.Thread(target=ask, args=(budget,)) for budget in (0.9, {"target": 1.0, "min": 0.8})]
        for thread in asking:
            thread.start()
        wait_for(server, "rheostat_retile_total", 4)
        running.close()
        for thread in asking:
            thread.join()
        fixed, lowered = sorted(computes, key=lambda compute: compute["requested"])
        assert (fixed["requested"], fixed["granted"], fixed["reason"]) == (0.9, 0.9, "requested")
        assert (lowered["requested"], lowered["reason"]) == (1.0, "load")
        assert 0.8 <= lowered["granted"] < 1.0
        server.wait_until_idle()
