"""Server-sent events, and noticing that a client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

DONE = "data: [DONE]\n\n"
"""The last event of every stream."""


def event(content: BaseModel | Mapping[str, Any], *, drop: frozenset[str] = frozenset()) -> str:
    """One event with a JSON body, without the top-level fields in ``drop``."""
    if isinstance(content, BaseModel):
        return f"data: {content.model_dump_json(exclude=set(drop))}\n\n"
    return f"data: {json.dumps(content)}\n\n"


def stream_responses(whole: type[BaseModel], chunk: type[BaseModel] | None = None) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entry of a route that answers with ``whole``, or with a stream of ``chunk`` (default: the same)."""
    name = (chunk or whole).__name__
    data = {"type": "string", "description": f"A `{name}` or, in a stream that fails, an error; at the end `[DONE]`."}
    event = {"type": "object", "description": "One event.", "properties": {"data": data}, "required": ["data"]}
    return {
        200: {
            "model": whole | chunk if chunk else whole,
            "description": "The answer; with `stream`, server-sent events.",
            "content": {"text/event-stream": {"schema": event}},
        }
    }


class EventStreamResponse(StreamingResponse):
    """A stream of events; ``on_close`` is called however it ends, even if it never began."""

    def __init__(self, events: AsyncIterator[str], on_close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``; None, and ``work`` cancelled, as soon as the client has gone. The body must be read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
