"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from model.tokenizer import DOCUMENT, ByteTokenizer
from service.api.auth import CountedRoute, KeyDependency
from service.api.context import Context, ContextDependency
from service.api.errors import ERRORS
from service.api.generation import Generation, Identity, Piece
from service.api.logprobs import LogprobsBuilder
from service.api.requests import BudgetHeader, check_limits, check_model, choose_grant, sampling_params
from service.api.schemas.completions import DEFAULT_LENGTH, Choice, Completion, CompletionRequest
from service.api.schemas.generation import Usage
from service.api.schemas.prompt import Prompt
from service.api.streaming import stream_responses
from service.engine.sequence import Sequence
from service.keys import ApiKey

router = APIRouter(tags=["generation"], route_class=CountedRoute)


@router.post("/v1/completions", response_model=None, responses=stream_responses(Completion) | ERRORS)
async def create_completion(
    request: Request,
    body: CompletionRequest,
    context: ContextDependency,
    key: KeyDependency,
    x_compute_budget: BudgetHeader = None,
) -> Response:
    """Generate text after one or several prompts within a compute budget; streamed on request."""
    sequences = build_sequences(context, key, body, x_compute_budget)
    shape = CompletionShape(Identity.new("cmpl", context.model_name), body)
    return await Generation(context, sequences).respond(request, body, shape)


def build_sequences(
    context: Context, key: ApiKey | None, body: CompletionRequest, budget_header: str | None
) -> list[Sequence]:
    """The engine's form of a request: ``n`` sequences per prompt, those of the first prompt first.

    Raises:
        ApiError: a field is out of the server's or the key's limits, or the model is not the one that is served.
    """
    check_model(context, body.model)
    prompts = [tokens_of(prompt, context.tokenizer) for prompt in body.prompt]
    most = context.settings.max_tokens
    params = replace(
        sampling_params(body, min(DEFAULT_LENGTH, most) if body.max_tokens is None else body.max_tokens, body.stop),
        echo=body.echo,
        logprobs=body.logprobs,
        score_prompt=body.echo and body.logprobs is not None,
    )
    check_limits(context, prompts, body.n, params, "max_tokens")
    grant, arrived = choose_grant(context, key, body, budget_header), time.monotonic()
    return [
        Sequence(prompt, params.of_choice(choice), grant, arrived=arrived)
        for prompt in prompts
        for choice in range(body.n)
    ]


def tokens_of(prompt: Prompt, tokenizer: ByteTokenizer) -> list[int]:
    """The tokens of a prompt, the first one the document separator; ids that do not begin with one get it."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    return list(prompt) if prompt[:1] == (DOCUMENT,) else [DOCUMENT, *prompt]


class CompletionShape:
    """OpenAI's completion objects."""

    def __init__(self, identity: Identity, body: CompletionRequest) -> None:
        self._identity = identity
        separators = [body.echo and not isinstance(prompt, str) and prompt[:1] == (DOCUMENT,) for prompt in body.prompt]
        self._builders = (
            None
            if body.logprobs is None
            else [LogprobsBuilder(separator=separator) for separator in separators for _ in range(body.n)]
        )

    def whole(self, pieces: list[Piece], usage: Usage) -> BaseModel:
        """The answer, from one piece per choice."""
        return self._completion([self._choice(piece) for piece in pieces], usage)

    def chunks(self, piece: Piece) -> Iterable[BaseModel]:
        """One chunk."""
        return [self._completion([self._choice(piece)], None)]

    def closing(self, usage: Usage) -> BaseModel:
        """A chunk without choices."""
        return self._completion([], usage)

    def _choice(self, piece: Piece) -> Choice:
        return Choice(
            index=piece.index,
            text=piece.text,
            logprobs=None if self._builders is None else self._builders[piece.index].add(piece.scores),
            finish_reason=piece.reason,
            compute=piece.compute,
        )

    def _completion(self, choices: list[Choice], usage: Usage | None) -> Completion:
        identity = self._identity
        return Completion(id=identity.id, created=identity.created, model=identity.model, choices=choices, usage=usage)
