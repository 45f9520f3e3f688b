"""Clients that leave at every stage of a request."""

from __future__ import annotations

import logging

import pytest

from tests.reliability.wire import Wire, completion, head, wait_until
from tests.service.servers import Running

ASKS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
LEAVES = pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])

PROMPT = "y" * 100_000


@LEAVES
@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", head(1000), head(1000) + b'{"prompt": '])
def test_before_the_request_is_whole(server: Running, sent: bytes, reset: bool) -> None:
    generated = server.metric("rheostat_generation_tokens_total")
    wire = Wire(server)
    wire.send(sent)
    wire.leave(reset=reset)
    server.complete(max_tokens=2, ignore_eos=True)
    assert server.metric("rheostat_generation_tokens_total") == generated + 2


@LEAVES
@ASKS
def test_while_queued(server: Running, stream: bool, reset: bool) -> None:
    running = [Wire(server) for _ in range(2)]
    for wire in running:
        wire.send(completion(stream=stream))
    wait_until(lambda: server.metric("rheostat_num_requests_running") == 2)
    waiting = Wire(server)
    waiting.send(completion(stream=stream))
    wait_until(lambda: server.metric("rheostat_num_requests_waiting") == 1)
    waiting.leave(reset=reset)
    wait_until(lambda: server.metric("rheostat_num_requests_waiting") == 0)
    assert server.metric("rheostat_num_requests_running") == 2
    for wire in running:
        wire.leave(reset=reset)


@LEAVES
@ASKS
def test_in_prefill(server: Running, stream: bool, reset: bool) -> None:
    read, generated = (server.metric(f"rheostat_{name}_tokens_total") for name in ("prompt", "generation"))
    wire = Wire(server)
    wire.send(completion(prompt=PROMPT, stream=stream))
    wait_until(lambda: server.metric("rheostat_prompt_tokens_total") > read)
    wire.leave(reset=reset)
    wait_until(lambda: server.metric("rheostat_num_requests_running") == 0)
    assert server.metric("rheostat_prompt_tokens_total") < read + len(PROMPT)
    assert server.metric("rheostat_generation_tokens_total") == generated


@LEAVES
@ASKS
def test_in_decode(server: Running, stream: bool, reset: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    generated = server.metric("rheostat_generation_tokens_total")
    spent = server.metric("rheostat_compute_flops_total")
    wire = Wire(server)
    wire.send(completion(stream=stream))
    wait_until(lambda: server.metric("rheostat_generation_tokens_total") > generated + 5)
    server.complete(max_tokens=2, ignore_eos=True)
    wire.leave(reset=reset)
    server.wait_until_idle()
    lines = [line.fields for line in caplog.records if getattr(line, "fields", {}).get("finish_reasons")]
    assert sorted(line["finish_reasons"] for line in lines) == [["abort"], ["length"]]
    billed = sum(line["compute"]["spent_flops"] for line in lines)
    assert billed == server.metric("rheostat_compute_flops_total") - spent, "the log's bills are the counter"
    assert sum(line["completion_tokens"] for line in lines) == (
        server.metric("rheostat_generation_tokens_total") - generated
    )
    assert next(line["status"] for line in lines if line["finish_reasons"] == ["abort"]) == (200 if stream else 499)
