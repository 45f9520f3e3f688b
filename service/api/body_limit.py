"""How long a request's body may be, and how long it may take."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import error_body


class BodyLimit:
    """Reads a request's body before the app does; answers 413 to one that is too long, 408 to one that is too slow.

    A length that was declared is refused before a byte of the body is read.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            message = f"the body did not arrive within {self._seconds:g} seconds"
            await _refusal(408, message, "request_timeout")(scope, receive, send)
            return
        except _TooLongError:
            message = f"the body must not be longer than {self._max_bytes} bytes"
            await _refusal(413, message, "body_too_large")(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client left before its end."""
        declared = Headers(scope=scope).get("content-length", "0")
        if int(declared) > self._max_bytes:  # the protocol lets digits pass only
            raise _TooLongError
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise _TooLongError
            more = message.get("more_body", False)
        return bytes(body)


class _TooLongError(Exception):
    pass


def _refusal(status: int, message: str, code: str) -> JSONResponse:
    return JSONResponse(error_body(status, message, code=code), status, {"Connection": "close"})
