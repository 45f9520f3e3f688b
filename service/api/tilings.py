"""``POST /v1/tilings``: where a text is dense, and what the budgets make of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from model.adaptive.density import FEATURES, STANDARDISED
from model.cost import CostModel
from model.evaluation.tilings import PieceAnalysis, TilingPlan
from model.ops.tiling import Bytes, Floats
from service.api.auth import CountedRoute
from service.api.context import Context, ContextDependency
from service.api.errors import ERRORS
from service.api.generation import respond_whole
from service.api.requests import admit, check_length, check_model, failure
from service.api.schemas.tilings import (
    LONGEST_TEXT,
    Features,
    TileModel,
    TilingModel,
    Tilings,
    TilingsRequest,
    TilingsUsage,
)
from service.engine.budget import ComputeBudget, Grant, grant
from service.engine.engine_thread import OutputStream
from service.engine.sequence import SamplingParams, Sequence

router = APIRouter(tags=["analysis"], route_class=CountedRoute)


@router.post("/v1/tilings", response_model=None, responses={200: {"model": Tilings}, **ERRORS})
async def create_tilings(request: Request, body: TilingsRequest, context: ContextDependency) -> Response:
    """Density, features, tiles and costs of a text at one or more budgets; nothing is generated."""
    check_model(context, body.model)
    tokens = await run_in_threadpool(context.tokenizer.encode, body.text)
    check_length(context, "text", tokens, LONGEST_TEXT)
    grants = [grant(ComputeBudget.exactly(budget), context.cost) for budget in body.budgets]
    causal = body.rule == "online"
    rates = [given.rates.decode if causal else given.rates.prefill for given in grants]
    sequence = Sequence(
        tokens,
        SamplingParams(max_tokens=0),
        grant(ComputeBudget.exactly(1.0), context.cost),
        arrived=time.monotonic(),
        tokenizer=context.tokenizer,
        plans=tuple(TilingPlan(rate, causal, given.rates.depth) for rate, given in zip(rates, grants, strict=True)),
    )
    outputs = admit(context, [sequence], whole=True)
    return await respond_whole(request, analyse(context, body, grants, sequence, outputs), outputs.close)


async def analyse(
    context: Context, body: TilingsRequest, grants: list[Grant], sequence: Sequence, outputs: OutputStream
) -> Callable[[], Tilings]:
    """What makes the answer, once the engine has read the text.

    Raises:
        ApiError: the engine failed, or the server stopped.
    """
    pieces: list[PieceAnalysis] = []
    async for output in outputs:
        error = failure(output.finish)
        if error is not None:
            raise error
        pieces += output.analyses
    return partial(assemble, context, body, grants, sequence, pieces)


def assemble(
    context: Context, body: TilingsRequest, grants: list[Grant], sequence: Sequence, pieces: list[PieceAnalysis]
) -> Tilings:
    """The answer, from the analysis of the text's blocks; ``grants`` are those of the budgets."""
    features = np.concatenate([piece.features for piece in pieces])
    first = 0 if pieces[0].measured else STANDARDISED
    columns = {name: features[:, column].tolist() for column, name in enumerate(FEATURES) if column >= first}
    assert sequence.plans is not None, "the sequence was made with plans"
    return Tilings(
        model=context.model_name,
        rule=body.rule,
        tokens=sequence.prompt,
        density=np.concatenate([piece.density for piece in pieces]).tolist(),
        features=Features(**columns),
        tilings=[
            describe(given, plan, [(piece.fires[i], piece.losses[i]) for piece in pieces], context.cost)
            for i, (given, plan) in enumerate(zip(grants, sequence.plans, strict=True))
        ],
        usage=TilingsUsage(prompt_tokens=len(sequence.prompt), compute=sequence.usage()),
    )


def describe(given: Grant, plan: TilingPlan, pieces: list[tuple[Bytes, Floats]], cost: CostModel) -> TilingModel:
    """A finished tiling and its costs; ``pieces`` are its fires and losses, block by block."""
    fires = np.concatenate([fires for fires, _ in pieces])
    lost = np.concatenate([0.0, *(lost for _, lost in pieces)], axis=None).cumsum()
    length = len(fires)
    ends = (np.flatnonzero(fires) + 1).tolist()
    depth = given.rates.depth
    between = cost.below(depth) + (cost.propagation(depth) if cost.analysed(plan.rate) else 0)
    bounds = [0, *ends, *([length] if ends and ends[-1] < length else [])]
    tiles = [
        TileModel(
            start=start,
            end=end,
            info_loss=lost[end] - lost[start],
            compute_cost=(end - start) * between + (cost.trunk(depth) - between if number < len(ends) else 0),
        )
        for number, (start, end) in enumerate(pairwise(bounds))
    ]
    heads = length if plan.causal else 0
    analysed = length if cost.analysed(plan.rate) else 0
    spent = cost.flops(length, len(ends), heads, analysed, depth=depth).total
    full = cost.full_flops(length, heads)
    return TilingModel(
        budget=given.requested,
        granted=spent / full if given.settled else given.granted,
        reason=given.reason.value,
        depth=depth,
        tiles=tiles,
        info_loss=lost[-1],
        spent=spent / full,
        spent_flops=spent,
        full_flops=full,
        mean_tile_bytes=length / len(ends) if ends else None,
    )
