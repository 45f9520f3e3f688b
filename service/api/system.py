"""Models, health, version, metrics and the schema."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse

from service.api.auth import KeyedRoute
from service.api.context import Context, ContextDependency
from service.api.errors import ERRORS, ApiError
from service.api.openapi import with_limits
from service.api.requests import check_model, stopping
from service.api.schemas.system import Health, ModelCard, ModelList, Version

router = APIRouter(tags=["system"], route_class=KeyedRoute)
health_router = APIRouter(tags=["system"])
"""What orchestrators ask without a key."""


@router.get("/v1/models", responses=ERRORS)
async def list_models(context: ContextDependency) -> ModelList:
    """The served model."""
    return ModelList(data=[_card(context)])


@router.get("/v1/models/{model}", responses=ERRORS)
async def get_model(model: Annotated[str, Path(description="Its name.")], context: ContextDependency) -> ModelCard:
    """One model by name."""
    check_model(context, model)
    return _card(context)


@health_router.get("/health", responses=ERRORS)
async def health(context: ContextDependency) -> Health:
    """Whether the server is alive and takes requests: what both of the others ask."""
    _check_progress(context)
    _check_open(context)
    return Health()


@health_router.get("/health/live", responses=ERRORS)
async def live(context: ContextDependency) -> Health:
    """Whether the engine makes progress; where it does not, only a restart helps."""
    _check_progress(context)
    return Health()


@health_router.get("/health/ready", responses=ERRORS)
async def ready(context: ContextDependency) -> Health:
    """Whether new requests should be sent here."""
    _check_progress(context)
    _check_open(context)
    return Health()


@router.get("/version", responses=ERRORS)
async def get_version() -> Version:
    """The version of the server."""
    return Version(version=version("rheostat"))


@router.get("/metrics", response_class=Response, responses=ERRORS)
async def metrics(context: ContextDependency) -> Response:
    """All metrics in Prometheus' text format."""
    content, content_type = context.metrics.render()
    return Response(content, headers={"Content-Type": content_type})


@router.get("/openapi.json", include_in_schema=False)
async def schema(request: Request, context: ContextDependency) -> JSONResponse:
    """The API as an OpenAPI document, with the limits of this server."""
    return JSONResponse(with_limits(request.app.openapi(), context.settings, context.tokenizer.vocab_size))


@router.get("/docs", include_in_schema=False)
async def documentation(request: Request) -> HTMLResponse:
    """The same as a page."""
    return get_swagger_ui_html(openapi_url="/openapi.json", title=request.app.title)


def _check_progress(context: Context) -> None:
    """Raise 503 if the engine has died, or one step takes too long."""
    if context.engine.stalled_for() > context.settings.stall_seconds:
        raise ApiError(503, "the engine makes no progress", code="stalled")


def _check_open(context: Context) -> None:
    """Raise 503 if no new requests are taken."""
    if not context.engine.accepting:
        raise stopping()


def _card(context: Context) -> ModelCard:
    return ModelCard(
        id=context.model_name,
        created=context.started,
        max_model_len=context.max_model_len,
        compute_floor=context.cost.floor,
        adapted=context.adapted,
    )
