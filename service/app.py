"""The application: engine, routes, limits."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.lm import AdaptiveAttentionSystem
from model.tokenizer import ByteTokenizer
from service.api import chat, completions, system, tilings, tokens
from service.api.context import Context
from service.api.errors import error_body, install_error_handlers
from service.engine.engine import Engine
from service.engine.engine_thread import EngineThread
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Scheduler
from service.metrics import Metrics
from service.settings import Settings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def create_app(settings: Settings, model: AdaptiveAttentionSystem) -> FastAPI:
    """An app that serves ``model``; its engine runs between the app's startup and shutdown."""
    metrics = Metrics(model.config.name)
    runner = ModelRunner(model)
    runner.warm_up()
    engine = Engine(runner, Scheduler(settings.max_running), metrics, time.monotonic)
    thread = EngineThread(engine, settings.max_running + settings.max_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        thread.start()
        yield
        thread.stop()

    app = FastAPI(title="Rheostat", lifespan=lifespan)
    app.state.context = Context(
        settings=settings,
        engine=thread,
        metrics=metrics,
        cost=model.cost,
        tokenizer=ByteTokenizer(),
        model_name=model.config.name,
        adapted=model.config.adapted,
        started=int(time.time()),
    )
    install_error_handlers(app)
    for module in (completions, chat, tilings, tokens, system):
        app.include_router(module.router)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestId)
    return app


class RequestId:
    """Answers with the client's ``x-request-id``, or with a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Reads a request's body before the app does, and answers 413 if it is longer than ``max_bytes``.

    A body that is somewhat too long is read to its end and dropped, since most clients read no answer before they have
    sent everything; one that is far too long is cut off.
    """

    _PATIENCE = 16
    """How many times ``max_bytes`` are read before the connection is given up."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        body = bytearray()
        size, more = 0, True
        while more and size <= self._PATIENCE * self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            part = message.get("body", b"")
            size += len(part)
            if size <= self._max_bytes:
                body += part
            more = message.get("more_body", False)
        if size > self._max_bytes:
            text = f"the body must not be longer than {self._max_bytes} bytes"
            response = JSONResponse(error_body(413, text, code="body_too_large"), 413, {"Connection": "close"})
            await response(scope, receive, send)
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send)
