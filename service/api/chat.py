"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator
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
from service.api.logprobs import chat_logprobs
from service.api.requests import (
    BudgetHeader,
    check_generated,
    check_limits,
    check_model,
    choose_grant,
    make_choices,
    sampling_params,
)
from service.api.schemas.chat import (
    DEFAULT_LENGTH,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
)
from service.api.schemas.generation import Usage
from service.api.streaming import stream_responses
from service.api.template import TURN_STOPS, render
from service.engine.sequence import Sequence
from service.keys import ApiKey

router = APIRouter(tags=["generation"], route_class=CountedRoute)


@router.post(
    "/v1/chat/completions", response_model=None, responses=stream_responses(ChatCompletion, ChatChunk) | ERRORS
)
async def create_chat_completion(
    request: Request,
    body: ChatRequest,
    context: ContextDependency,
    key: KeyDependency,
    x_compute_budget: BudgetHeader = None,
) -> Response:
    """Generate the assistant's next message within a compute budget; streamed on request."""
    check_model(context, body.model)
    prompt = await run_in_threadpool(context.tokenizer.encode, render(body.messages))
    sequences = build_sequences(context, key, body, prompt, x_compute_budget)
    shape = ChatShape(Identity.new("chatcmpl", context.model_name), context.tokenizer, logprobs=body.logprobs)
    return await Generation(context, sequences, body).respond(request, shape)


def build_sequences(
    context: Context, key: ApiKey | None, body: ChatRequest, prompt: list[int], budget_header: str | None
) -> list[Sequence]:
    """The engine's form of a request: ``n`` sequences.

    Raises:
        ApiError: a field is out of the server's or the key's limits.
    """
    field, length = body.length
    max_tokens = min(DEFAULT_LENGTH, context.settings.max_tokens) if length is None else length
    # The template's stop strings are the end of an answer, which ignore_eos asks to go past.
    stops = body.stop if body.ignore_eos else (*body.stop, *TURN_STOPS)
    params = replace(sampling_params(body, max_tokens, stops), logprobs=body.top_logprobs if body.logprobs else None)
    check_generated(context, "max_tokens", body.max_tokens or 0)  # also where the newer field wins
    check_limits(context, [prompt], body.n, params, field, prompt_field="messages")
    return make_choices(context, prompt, params, body, key, choose_grant(context, key, body, budget_header))


class ChatShape:
    """OpenAI's chat completion objects."""

    def __init__(self, identity: Identity, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._identity = identity
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._begun: set[int] = set()

    def whole(self, pieces: list[Piece], usage: Usage) -> BaseModel:
        """The answer, from one piece per choice."""
        identity = self._identity
        choices = [self._choice(piece) for piece in pieces]
        return ChatCompletion(
            id=identity.id, created=identity.created, model=identity.model, choices=choices, usage=usage
        )

    def chunks(self, piece: Piece) -> Iterator[BaseModel]:
        """A chunk with the role where the choice begins, then one with its news."""
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            role = Delta(role="assistant", content="")
            yield self._chunk([ChunkChoice(index=piece.index, delta=role, logprobs=None, finish_reason=None)])
        choice = ChunkChoice(
            index=piece.index,
            delta=Delta(content=piece.text or None),
            logprobs=self._scores(piece),
            finish_reason=piece.reason,
            compute=piece.compute,
        )
        yield self._chunk([choice])

    def closing(self, usage: Usage) -> BaseModel:
        """A chunk without choices."""
        return self._chunk([], usage)

    def _choice(self, piece: Piece) -> ChatChoice:
        assert piece.reason is not None, "a whole choice has ended"
        return ChatChoice(
            index=piece.index,
            message=AssistantMessage(content=piece.text),
            logprobs=self._scores(piece),
            finish_reason=piece.reason,
            compute=piece.compute,
        )

    def _scores(self, piece: Piece) -> ChatLogprobs | None:
        return chat_logprobs(piece.scores, self._tokenizer) if self._logprobs else None

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> ChatChunk:
        identity = self._identity
        return ChatChunk(id=identity.id, created=identity.created, model=identity.model, choices=choices, usage=usage)
