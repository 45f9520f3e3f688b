"""The application: engine, routes, limits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from model.cost import CostModel
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import ByteTokenizer
from service.api import chat, completions, system, tilings, tokens
from service.api.body_limit import BodyLimit
from service.api.context import Context
from service.api.errors import install_error_handlers
from service.api.request_log import RequestLog
from service.engine.engine import Engine
from service.engine.engine_thread import EngineThread
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Scheduler
from service.keys import Keyring, RateLimiter
from service.metrics import Metrics
from service.settings import Settings

_CORS_HEADERS = ["Authorization", "Content-Type", "X-Compute-Budget", "X-Request-Id"]


def create_app(settings: Settings, model: AdaptiveAttentionSystem, keys: Keyring) -> FastAPI:
    """An app that serves ``model`` to those who have one of ``keys``, or to all if there are none.

    Its engine runs between the app's startup and shutdown.
    """
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

    app = FastAPI(title="Rheostat", lifespan=lifespan, openapi_url=None)
    app.state.context = Context(
        settings=settings,
        keys=keys,
        rates=RateLimiter(time.monotonic),
        engine=thread,
        metrics=metrics,
        cost=model.cost,
        tokenizer=ByteTokenizer(),
        model_name=model.config.name,
        adapted=model.config.adapted,
        started=int(time.time()),
    )
    install_error_handlers(app)
    _add_routes(app, secured=len(keys) > 0)
    _add_layers(app, settings, model.cost)
    return app


def _add_routes(app: FastAPI, *, secured: bool) -> None:
    """Health is open. The routes of every other router ask for a key, if the server has any."""
    described = [Depends(HTTPBearer(auto_error=False))] if secured else []  # for the schema only
    app.include_router(system.health_router)
    for module in (system, tokens, completions, chat, tilings):
        app.include_router(module.router, dependencies=described)


def _add_layers(app: FastAPI, settings: Settings, cost: CostModel) -> None:
    """What stands around the routes; the last one added is the outermost."""
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=_CORS_HEADERS,
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    app.add_middleware(RequestLog, cost=cost)
