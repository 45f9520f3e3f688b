"""Bodies, heads and connections that are too long, too slow or no HTTP at all."""

from __future__ import annotations

import itertools
import socket
import time

import pytest

from tests.reliability.conftest import PATIENCE
from tests.reliability.wire import Wire, completion, head, wait_until
from tests.service.servers import Running, serving, tiny_model

GIGABYTE = 1 << 30
BLOCK = b" " * (1 << 16)
CHUNK = b"10000\r\n" + BLOCK + b"\r\n"
BODY = b'{"prompt": "x", "max_tokens": 2, "ignore_eos": true}'


def beside(server: Running) -> None:
    """A normal request succeeds while something else goes on."""
    assert server.complete(max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_declared_gigabyte_is_refused_before_it_is_sent(server: Running, method: str) -> None:
    with Wire(server) as wire:
        wire.send(head(GIGABYTE, method))
        answer = wire.answer()
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
        assert answer.headers["connection"] == "close"
        beside(server)


@pytest.mark.parametrize(("length", "part"), [(GIGABYTE, BLOCK), ("chunked", CHUNK)], ids=["declared", "chunked"])
def test_a_gigabyte_that_is_sent_is_refused_in_words_and_then_cut_off(
    server: Running, length: int | str, part: bytes
) -> None:
    with Wire(server) as wire:
        wire.send(head(length))
        for _ in range(20):  # far more than is taken; a client that sends all before it reads must not fail at once
            wire.send(part)
            time.sleep(0.02)
        answer = wire.answer()
        assert (answer.status, answer.error["code"]) == (413, "body_too_large")
        beside(server)
        parts = itertools.chain.from_iterable((part, time.sleep(0.05) or b"") for _ in itertools.count())
        wire.send_until_refused(parts, at_most=GIGABYTE // 8)


@pytest.mark.parametrize("line", [b"a" * 4096, b"a: b\r\n" * 700], ids=["one header", "many headers"])
def test_an_endless_head_is_refused(server: Running, line: bytes) -> None:
    with Wire(server) as wire:
        wire.send(b"GET /health HTTP/1.1\r\nX: ")
        for _ in range(20):
            wire.send(line)
            time.sleep(0.02)
        answer = wire.answer()
        assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
        beside(server)
        parts = (line for _ in itertools.count() if not time.sleep(0.02))
        wire.send_until_refused(parts, at_most=1 << 24)


def test_a_head_that_drips_is_refused(server: Running) -> None:
    began = time.monotonic()
    with Wire(server) as wire:
        wire.drip(b"GET /health HTTP/1.1\r\nX: " + b"a" * 1000, 0.05)
        answer = wire.answer()
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        assert time.monotonic() - began >= PATIENCE["header_seconds"] - 0.1
        beside(server)


def test_a_second_head_on_a_connection_has_no_more_time_than_the_first(server: Running) -> None:
    with Wire(server) as wire:
        wire.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert wire.answer().status == 200
        wire.drip(b"GET /health HTTP/1.1\r\nX: " + b"a" * 1000, 0.05)
        assert wire.answer().status == 408


@pytest.mark.parametrize("asked", [False, True], ids=["new", "kept alive"])
def test_a_silent_connection_is_closed_without_a_word(server: Running, asked: bool) -> None:
    with Wire(server) as wire:
        if asked:
            wire.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert wire.answer().status == 200
        assert wire.ended() == b""


@pytest.mark.parametrize("length", [1000, "chunked"])
def test_a_body_that_drips_is_refused(server: Running, length: int | str) -> None:
    with Wire(server) as wire:
        wire.send(head(length))
        wire.drip(b"1\r\n \r\n" * 300, 0.05)
        answer = wire.answer()
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        beside(server)


def test_a_slow_body_that_is_in_time_is_served(server: Running) -> None:
    with Wire(server) as wire:
        wire.send(head(len(BODY)))
        wire.drip(BODY, 0.001)
        assert wire.answer().status == 200


def test_a_reader_that_does_not_read_its_stream_is_cut_off() -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted connections inherit it
    listener.bind(("127.0.0.1", 0))
    with serving(tiny_model(), listener=listener, max_running=2, max_tokens=1 << 20, **PATIENCE) as server:
        with Wire(server, receive_buffer=4096) as wire:
            wire.send(completion(stream=True))
            wait_until(lambda: server.metric("rheostat_num_requests_running") == 1)
            beside(server)
            wait_until(lambda: server.metric("rheostat_num_requests_running") == 0)
            text = server.client.get("/metrics").text
            assert 'rheostat_request_success_total{finished_reason="abort"} 1.0' in text
            assert b"[DONE]" not in wire.ended()
        server.wait_until_idle()


def test_a_reader_that_reads_none_of_many_answers_is_cut_off(server: Running) -> None:
    with Wire(server, receive_buffer=4096) as wire:
        parts = itertools.repeat(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
        wire.socket.settimeout(10)
        wire.send_until_refused(parts, at_most=1 << 26)
        beside(server)


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /hea", head(len(BODY)), head(len(BODY)) + BODY[:10], completion(), completion(stream=True)],
    ids=["nothing", "head", "no body", "body", "request", "stream"],
)
def test_a_client_that_closes_its_side_has_left(server: Running, sent: bytes) -> None:
    with Wire(server) as wire:
        wire.send(sent)
        if sent.endswith(b"}"):
            wait_until(lambda: server.metric("rheostat_num_requests_running") == 1)
        wire.socket.shutdown(socket.SHUT_WR)
        beside(server)
        received = wire.ended()
    assert b"[DONE]" not in received
    if b"stream" not in sent:
        assert received == b""


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\0\xff\xfe garbage\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n", 400),
        (b"GET /hea\0lth HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (head("gzip"), 501),
        (head("chunked") + b"zz\r\n", 400),
        (head("chunked") + b"1\r\n{garbage", 400),
    ],
)
def test_what_is_no_http_is_refused(server: Running, sent: bytes, status: int) -> None:
    with Wire(server) as wire:
        wire.send(sent)
        answer = wire.answer()
        assert (answer.status, answer.error["code"]) == (status, "invalid_http")
        beside(server)


def test_a_thousand_connections_are_served() -> None:
    with serving(tiny_model(), max_connections=1100) as server:
        wires = [Wire(server) for _ in range(1000)]
        for wire in wires:
            wire.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        beside(server)
        assert {wire.answer().status for wire in wires} == {200}
        for wire in wires:
            wire.socket.close()
        server.wait_until_idle()


def test_a_thousand_idle_connections_make_room_for_one_that_asks() -> None:
    with serving(tiny_model(), max_connections=50, header_seconds=60) as server:
        wires = [Wire(server) for _ in range(1000)]
        beside(server)
        with Wire(server) as wire:
            wire.send(head(len(BODY)) + BODY)
            assert wire.answer().status == 200
        for wire in wires[:900]:  # the longest idle went first
            assert wire.ended() == b""
        for wire in wires:
            wire.socket.close()
        server.wait_until_idle()


def test_a_connection_too_many_is_refused_while_all_are_busy() -> None:
    with serving(tiny_model(), max_connections=3) as server:
        busy = [Wire(server) for _ in range(3)]
        for wire in busy:
            wire.send(head(len(BODY)) + BODY[:-1])
        time.sleep(1.0)
        with Wire(server) as wire:
            wire.send(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = wire.answer()
        assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
        assert int(answer.headers["retry-after"]) >= 1
        for wire in busy:
            wire.send(BODY[-1:])
            assert wire.answer().status == 200
        beside(server)
        server.wait_until_idle()
        for wire in busy:
            wire.socket.close()
