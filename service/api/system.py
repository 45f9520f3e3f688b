"""Models, health and metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse

from service.api.context import Context, get_context
from service.api.errors import ApiError
from service.api.schemas import ModelCard, ModelList

router = APIRouter()

ContextDependency = Annotated[Context, Depends(get_context)]


@router.get("/v1/models")
async def list_models(context: ContextDependency) -> ModelList:
    """The served model."""
    return ModelList(data=[_card(context)])


@router.get("/v1/models/{model}")
async def get_model(model: str, context: ContextDependency) -> ModelCard:
    """One model by name."""
    if model != context.model_name:
        message = f"the model {model!r:.80} does not exist; this server has {context.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return _card(context)


@router.get("/health")
async def health(context: ContextDependency) -> JSONResponse:
    """200 while the engine makes progress, 503 once it has died or one step takes too long."""
    stalled = context.engine.stalled_for()
    if stalled > context.settings.stall_seconds:
        return JSONResponse({"status": "unhealthy", "reason": "the engine makes no progress"}, 503)
    return JSONResponse({"status": "ok"})


@router.get("/metrics", response_class=Response)
async def metrics(context: ContextDependency) -> Response:
    """All metrics in Prometheus' text format."""
    content, content_type = context.metrics.render()
    return Response(content, headers={"Content-Type": content_type})


def _card(context: Context) -> ModelCard:
    settings = context.settings
    return ModelCard(
        id=context.model_name,
        created=context.started,
        max_model_len=settings.max_prompt_bytes + settings.max_tokens,
        compute_floor=context.cost.floor,
    )
