"""The application: engine, routes, limits."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware

from model.device import core_count
from model.lm import AdaptiveAttentionSystem
from model.tokenizer import ByteTokenizer, Tokenizer
from service.api import chat, completions, system, tilings, tokens
from service.api.body_limit import BodyLimit
from service.api.context import Context
from service.api.errors import install_error_handlers
from service.api.request_log import RequestLog
from service.engine.engine import Deadlines, Engine
from service.engine.engine_thread import Admission, EngineThread
from service.engine.load import LoadControl
from service.engine.model_runner import ModelRunner
from service.engine.scheduler import Limits, Scheduler
from service.keys import Keyring, RateLimiter
from service.metrics import Metrics
from service.settings import Settings

_CORS_HEADERS = ["Authorization", "Content-Type", "X-Compute-Budget", "X-Request-Id"]


def create_app(
    settings: Settings, model: AdaptiveAttentionSystem, keys: Keyring, tokenizer: Tokenizer | None = None
) -> FastAPI:
    """An app that serves ``model`` to those who have one of ``keys``, or to all if there are none.

    Its engine runs between the app's startup and shutdown. Tokens are bytes unless ``tokenizer`` says otherwise.

    Raises:
        ValueError: the model's vocabulary is not the tokenizer's.
    """
    tokenizer = tokenizer or ByteTokenizer()
    tokenizer.require_vocabulary(model.config.name, model.config.vocab_size)
    metrics = Metrics(model.config.name, model.config.d_state_levels)
    thread = _make_engine(settings, model, metrics)

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
        tokenizer=tokenizer,
        model_name=model.config.name,
        adapted=model.config.adapted,
        started=int(time.time()),
    )
    install_error_handlers(app)
    _add_routes(app, secured=len(keys) > 0)
    _add_layers(app, settings)
    return app


def _make_engine(settings: Settings, model: AdaptiveAttentionSystem, metrics: Metrics) -> EngineThread:
    workers = (settings.threads or core_count()) if model.device.type == "cpu" else 1
    runner = ModelRunner(model, settings.prefix_cache_bytes, workers)
    runner.warm_up()
    limits = Limits.for_states(
        runner.state_sizes,
        running=settings.max_running,
        block_size=runner.block_size,
        state_bytes=settings.state_bytes,
        prefill_share=settings.prefill_share,
        blocks=workers,
        decode_stretch=settings.decode_stretch,
    )
    engine = Engine(
        runner,
        Scheduler(limits, runner.state_sizes),
        metrics,
        time.monotonic,
        load=LoadControl(settings.load_patience_seconds),
        deadlines=Deadlines(settings.queue_seconds, settings.request_seconds),
    )
    most = settings.max_running + settings.max_waiting
    admission = Admission(most, settings.max_running, settings.queue_seconds, settings.stall_seconds)
    return EngineThread(engine, admission, settings.stream_seconds)


def _add_routes(app: FastAPI, *, secured: bool) -> None:
    """Health is open. The routes of every other router ask for a key, if the server has any."""
    described = [Depends(HTTPBearer(auto_error=False))] if secured else []  # for the schema only
    app.include_router(system.health_router)
    for module in (system, tokens, completions, chat, tilings):
        app.include_router(module.router, dependencies=described)


def _add_layers(app: FastAPI, settings: Settings) -> None:
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
    app.add_middleware(RequestLog)
