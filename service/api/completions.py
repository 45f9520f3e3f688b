"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from model.tokenizer import Tokenizer
from service.api.auth import CountedRoute, KeyDependency
from service.api.context import Context, ContextDependency
from service.api.errors import ERRORS
from service.api.generation import Generation, Identity, Piece
from service.api.logprobs import LogprobsBuilder
from service.api.requests import (
    BudgetHeader,
    check_ids,
    check_limits,
    check_model,
    choose_grant,
    make_choices,
    sampling_params,
)
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
    check_model(context, body.model)
    prompts = await run_in_threadpool(lambda: [read_prompt(context, prompt) for prompt in body.prompt])
    sequences = build_sequences(context, key, body, [tokens for tokens, _ in prompts], x_compute_budget)
    shown = [tokens[0] if sent and body.echo else None for tokens, sent in prompts]
    shape = CompletionShape(Identity.new("cmpl", context.model_name), body, context.tokenizer, shown)
    return await Generation(context, sequences, body).respond(request, shape)


def build_sequences(
    context: Context, key: ApiKey | None, body: CompletionRequest, prompts: list[list[int]], budget_header: str | None
) -> list[Sequence]:
    """The engine's form of a request: ``n`` sequences per prompt, those of the first prompt first.

    Raises:
        ApiError: a field is out of the server's or the key's limits.
    """
    most = context.settings.max_tokens
    params = replace(
        sampling_params(body, min(DEFAULT_LENGTH, most) if body.max_tokens is None else body.max_tokens, body.stop),
        echo=body.echo,
        logprobs=body.logprobs,
        score_prompt=body.echo and body.logprobs is not None,
    )
    check_limits(context, prompts, body.n, params, "max_tokens")
    given = choose_grant(context, key, body, budget_header)
    return [choice for prompt in prompts for choice in make_choices(context, prompt, params, body, key, given)]


def read_prompt(context: Context, prompt: Prompt) -> tuple[list[int], bool]:
    """The tokens of a prompt as the model reads it, and whether the first one was sent rather than put in front.

    Raises:
        ApiError: 400, an id is none of the model's.
    """
    if isinstance(prompt, str):
        sent = context.tokenizer.tokens(prompt)
    else:
        sent = list(prompt)
        check_ids(context, "prompt", sent)
    tokens = context.tokenizer.begin(sent, text=isinstance(prompt, str))
    return tokens, len(tokens) == len(sent)


class CompletionShape:
    """OpenAI's completion objects.

    Args:
        shown: per prompt, its first token, which nothing can score, where the answer lists it.
    """

    def __init__(
        self, identity: Identity, body: CompletionRequest, tokenizer: Tokenizer, shown: list[int | None]
    ) -> None:
        self._identity = identity
        self._builders = (
            None
            if body.logprobs is None
            else [LogprobsBuilder(tokenizer, first) for first in shown for _ in range(body.n)]
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
