"""The outermost layer: request ids, one log line per request, and an answer to what went wrong inside."""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import internal_error
from service.engine.engine_thread import OutputStream
from service.engine.sequence import Sequence, total_usage

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

CLIENT_LEFT = 499
"""The status that the log gives a request whose client had gone before the answer began."""


@dataclass(slots=True)
class RequestRecord:
    """What the log says of one request; filled in while the request is worked on."""

    request_id: str
    method: str
    began: float
    """Clock time in seconds."""
    route: str | None = None
    """The route's template, never the path that the client sent."""
    status: int = CLIENT_LEFT
    key: str | None = None
    """Name of the API key."""
    headers: dict[str, str] = field(default_factory=dict)
    """To be sent with the answer, whatever it is."""
    sequences: list[Sequence] = field(default_factory=list)
    seconds: float | None = None
    """From the request's head to the end of its answer; None before that."""
    open_streams: int = 0

    def follow(self, outputs: OutputStream) -> None:
        """Put sequences on the bill; the log line then waits for their end, so that the bill is exact."""
        self.sequences += outputs.sequences
        self.open_streams += 1

        def ended() -> None:
            self.open_streams -= 1
            self.write_if_done()

        outputs.on_end = ended

    def write_if_done(self) -> None:
        """Write the line once the answer and every sequence have ended."""
        if self.seconds is not None and not self.open_streams:
            logger.info("request", extra={"fields": self.fields()})

    def fields(self) -> dict[str, Any]:
        """The line's fields. Text of prompts and answers is not among them."""
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "key": self.key,
            "seconds": round(self.seconds or 0.0, 6),
        }
        if self.sequences:
            usage = total_usage(self.sequences)
            fields |= {
                "compute": {
                    "requested": usage.requested,
                    "granted": usage.granted,
                    "spent": usage.spent,
                    "spent_flops": usage.spent_flops,
                    "full_flops": usage.full_flops,
                    "reason": usage.reason,
                },
                "prompt_tokens": sum(sequence.read - sequence.inherited for sequence in self.sequences),
                "completion_tokens": sum(sequence.generated for sequence in self.sequences),
                "finish_reasons": [sequence.finish for sequence in self.sequences],
            }
        return fields


current_record: ContextVar[RequestRecord] = ContextVar("current_record")
"""The record of the request that this task works on."""


class RequestLog:
    """Gives each request an id (the client's ``x-request-id``, or a new one) and a log line when it has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = RequestRecord(request_id, scope["method"], time.monotonic())
        current_record.set(record)
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun, record.status = True, message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in ({"x-request-id": request_id} | record.headers).items():
                    headers[name] = value
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            if begun:  # too late for another answer: the connection is closed
                raise
            logger.exception("a request failed", extra={"fields": {"request_id": request_id}})
            error = internal_error()
            await JSONResponse(error.body(), error.status)(scope, receive, send_with_headers)
        finally:
            record.route = getattr(scope.get("route"), "path", None)
            record.seconds = time.monotonic() - record.began
            record.write_if_done()
