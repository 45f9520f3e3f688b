"""A load generator for any server of OpenAI's completions: seeded requests, closed and open loops, what came of each.

It speaks HTTP/1.1 on asyncio's streams, a connection per request: what it costs is taken from the server's cores.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHORTEST, LONGEST = 16, 4096
"""Bytes of a prompt."""
TOKENS = 32, 128
"""Generated, the least and the most."""
_REFUSALS = (429, 503)
_PAUSE = 0.1
"""Seconds that a client of a closed loop waits after a refusal."""
_STEPS = (math.sqrt(5) / 2 - 0.5, math.sqrt(2) - 1)


class End(StrEnum):
    """How a request ended, as its client saw it."""

    ANSWER = "answer"
    """A whole answer, with usage and the end of the stream."""
    REFUSED = "refused"
    """429 or 503."""
    ERROR = "error"
    """Anything else, a broken connection included."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to send."""

    prompt: str
    tokens: int
    """Generated in any case: the end of a document does not end it."""
    budget: float | dict[str, float]
    seed: int

    def body(self, *, stream: bool = True) -> bytes:
        """The JSON of the request."""
        fields: dict[str, Any] = {
            "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0.7, "seed": self.seed, "ignore_eos": True,
            "compute_budget": self.budget, "stream": stream,
        }  # fmt: skip
        return json.dumps(fields | ({"stream_options": {"include_usage": True}} if stream else {})).encode()


@dataclass(slots=True)
class Result:
    """What became of a request; times in seconds of the monotonic clock."""

    ask: Ask
    due: float
    """When it was to be sent; latencies count from here, so that a late generator does not flatter the server."""
    events: list[float] = field(default_factory=list)
    """Arrivals of pieces of text."""
    text: str = ""
    status: int | None = None
    end: End | None = None
    """None where the generator itself gave the request up."""
    ended: float = math.nan
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def latency(self) -> float:
        """Seconds to the end."""
        return self.ended - self.due


def workload(
    seed: int, budget: float | dict[str, float] = 1.0, tokens: tuple[int, int] = TOKENS, longest: int = LONGEST
) -> Iterator[Ask]:
    """Endless requests, the same for a seed: prompt length and number of tokens are log-uniform, the place is uniform.

    The two sizes are multiples of irrational numbers, modulo 1, so that any few dozen requests in a row are as much
    work as any other: short arms can be compared.
    """
    draw, text = random.Random(seed), corpus()
    first, second = draw.random(), draw.random()
    while True:
        size = _log_uniform(first, SHORTEST, longest)
        start = draw.randrange(len(text) - size)
        yield Ask(text[start : start + size], _log_uniform(second, *tokens), budget, draw.getrandbits(31))
        first, second = (first + _STEPS[0]) % 1.0, (second + _STEPS[1]) % 1.0


def _log_uniform(quantile: float, least: int, most: int) -> int:
    return round(math.exp(math.log(least) + quantile * math.log(most / least)))


def mean_tokens(asks: Iterator[Ask]) -> float:
    """Mean number of tokens of the requests of a workload, which depends little on its seed."""
    return statistics.fmean(ask.tokens for ask in islice(asks, 2000))


def corpus() -> str:
    """Code and prose of this repository, in ASCII."""
    paths = [*sorted((ROOT / "model").rglob("*.py")), *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    return text.encode("ascii", "ignore").decode("ascii")


def poisson_arrivals(seed: int, rate: float, seconds: float) -> list[float]:
    """Times in [0, ``seconds``) of a Poisson process of ``rate`` per second, rising."""
    draw, times = random.Random(seed), list[float]()
    at = draw.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += draw.expovariate(rate)
    return times


async def send(address: tuple[str, int], result: Result, *, stream: bool = True) -> None:
    """Send the request of ``result`` now and read its answer to the end; what comes is noted there."""
    try:
        reader, writer = await asyncio.open_connection(*address)
        try:
            body = result.ask.body(stream=stream)
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await _read_answer(reader, result)
        finally:
            writer.close()
    except (OSError, asyncio.IncompleteReadError, LookupError, ValueError):  # broken off, or not what was promised
        result.end = End.ERROR
    result.ended = time.monotonic()


async def _read_answer(reader: asyncio.StreamReader, result: Result) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    result.status = int(head.split(" ", 2)[1])
    if result.status != 200:
        result.end = End.REFUSED if result.status in _REFUSALS else End.ERROR
        return
    if "text/event-stream" not in head:
        answer = json.loads(await reader.readexactly(int(head.partition("content-length:")[2].split("\r\n")[0])))
        result.events.append(time.monotonic())
        result.text, result.usage, result.end = answer["choices"][0]["text"], answer["usage"], End.ANSWER
        return
    events: list[bytes] = []
    async for event in _events(reader):
        events.append(event)
        result.events.append(time.monotonic())
    _read_events(events, result)


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Data of server-sent events in a chunked body; a chunk holds whole events, as all servers here write them."""
    while size := int(await reader.readline(), 16):
        chunk = await reader.readexactly(size + 2)
        for part in chunk.split(b"\n\n"):
            if part.startswith(b"data: "):
                yield part[6:]
    await reader.readline()


def _read_events(events: list[bytes], result: Result) -> None:
    """Text, usage and end. Only once all have come: parsing would delay their time stamps."""
    if events[-1:] != [b"[DONE]"]:
        result.end = End.ERROR
        return
    del result.events[-2:]  # usage and end bring no text
    chunks = [json.loads(event) for event in events[:-1]]
    result.usage = chunks[-1]["usage"]
    result.text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    result.end = End.ANSWER


async def closed_loop(
    address: tuple[str, int], asks: Iterator[Ask], clients: int, seconds: float, *, stream: bool = True
) -> list[Result]:
    """So many clients for so long, each with its next request as soon as its last one has ended.

    What is open at the end is waited for: without it, slow requests would be missing from the latencies.

    Raises:
        RuntimeError: a request ended with an error.
    """
    results: list[Result] = []
    stop = time.monotonic() + seconds

    async def client() -> None:
        while (now := time.monotonic()) < stop:
            current = Result(next(asks), now)
            results.append(current)
            await send(address, current, stream=stream)
            if current.end is End.ERROR:
                raise RuntimeError(f"a request failed, with status {current.status}")
            if current.end is End.REFUSED:
                await asyncio.sleep(_PAUSE)

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, RuntimeError):
            raise outcome
    return results


async def open_loop(address: tuple[str, int], asks: Iterator[Ask], arrivals: list[float]) -> list[Result]:
    """Requests at these times from now, whatever became of those before; returns when all have ended."""
    began = time.monotonic()
    results, tasks = list[Result](), list[asyncio.Task[None]]()
    for at, ask in zip(arrivals, asks, strict=False):
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        results.append(Result(ask, began + at))
        tasks.append(asyncio.create_task(send(address, results[-1])))
    await asyncio.gather(*tasks)
    return results
