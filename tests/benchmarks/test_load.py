"""The load generator: what it sends, and what it makes of answers."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from itertools import islice, pairwise

import pytest

from benchmarks.load import (
    LONGEST,
    SHORTEST,
    Ask,
    End,
    Result,
    closed_loop,
    open_loop,
    poisson_arrivals,
    send,
    workload,
)

ASK = Ask("x", 2, 1.0, 0)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunked(*events: str) -> bytes:
    return b"".join(b"%x\r\ndata: %s\n\n\r\n" % (len(event) + 8, event.encode()) for event in events)


def piece(text: str) -> str:
    return json.dumps({"choices": [{"text": text}], "usage": None})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 2}})
WHOLE = STREAM_HEAD + chunked(piece("a"), piece("b"), USAGE, "[DONE]") + b"0\r\n\r\n"


async def exchange(answer: bytes, asks: int = 1) -> list[Result]:
    """Results of an open loop against a server that gives this answer to every request, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        address = server.sockets[0].getsockname()[:2]
        return await open_loop(address, iter([ASK] * asks), [0.0] * asks)


def test_a_whole_stream_is_an_answer_with_one_arrival_per_text() -> None:
    for result in asyncio.run(exchange(WHOLE, 3)):
        assert (result.end, result.status, result.text) == (End.ANSWER, 200, "ab")
        assert result.usage == {"completion_tokens": 2}
        assert len(result.events) == 2
        assert result.due <= result.events[0] <= result.events[1] <= result.ended


def test_an_answer_in_one_piece_is_an_answer() -> None:
    body = json.dumps({"choices": [{"text": "ab"}], "usage": {"completion_tokens": 2}}).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: application/json\r\n\r\n" % len(body)
    (result,) = asyncio.run(exchange(head + body))
    assert (result.end, result.text, len(result.events)) == (End.ANSWER, "ab", 1)


@pytest.mark.parametrize("status", [429, 503])
def test_a_refusal_is_no_error(status: int) -> None:
    (result,) = asyncio.run(exchange(b"HTTP/1.1 %d No\r\ncontent-length: 0\r\n\r\n" % status))
    assert (result.end, result.status) == (End.REFUSED, status)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n",
        STREAM_HEAD,
        STREAM_HEAD + b"0\r\n\r\n",
        STREAM_HEAD + chunked(piece("a")),
        STREAM_HEAD + chunked(piece("a"), USAGE) + b"0\r\n\r\n",
        STREAM_HEAD + chunked(piece("a"), json.dumps({"error": {}}), "[DONE]") + b"0\r\n\r\n",
        STREAM_HEAD + chunked("[DONE]") + b"0\r\n\r\n",
        WHOLE[:-5],
    ],
)
def test_whatever_is_cut_off_or_not_as_promised_is_an_error(answer: bytes) -> None:
    (result,) = asyncio.run(exchange(answer))
    assert result.end is End.ERROR


def test_a_server_that_is_not_there_is_an_error_and_stops_a_closed_loop() -> None:
    result = Result(ASK, 0.0)
    asyncio.run(send(("127.0.0.1", 1), result))
    assert result.end is End.ERROR
    with pytest.raises(RuntimeError, match="failed"):
        asyncio.run(closed_loop(("127.0.0.1", 1), workload(0), 2, 30.0))


def test_a_workload_is_repeatable_and_covers_its_ranges_evenly() -> None:
    asks = list(islice(workload(3, 0.5), 200))
    assert asks == list(islice(workload(3, 0.5), 200))
    assert asks != list(islice(workload(4, 0.5), 200))
    sizes, tokens = [len(ask.prompt) for ask in asks], [ask.tokens for ask in asks]
    assert SHORTEST <= min(sizes) < 2 * SHORTEST < LONGEST / 2 < max(sizes) <= LONGEST
    assert 32 <= min(tokens) < 36 < 110 < max(tokens) <= 128
    for size, mean in ((sizes, math.sqrt(SHORTEST * LONGEST)), (tokens, 64)):
        for start in range(0, 200, 40):  # any 40 in a row have the mean of all
            assert statistics.geometric_mean(size[start : start + 40]) == pytest.approx(mean, rel=0.15)
    body = json.loads(asks[0].body())
    assert body["ignore_eos"] is True
    assert body["compute_budget"] == 0.5


def test_arrivals_are_a_poisson_process() -> None:
    arrivals = poisson_arrivals(1, 20.0, 500.0)
    assert arrivals == poisson_arrivals(1, 20.0, 500.0)
    assert all(0 <= one < later < 500.0 for one, later in pairwise(arrivals))
    assert len(arrivals) == pytest.approx(10_000, abs=4 * math.sqrt(10_000))
    gaps = [later - one for one, later in pairwise(arrivals)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.fmean(gaps), rel=0.05)  # as exponential gaps have
