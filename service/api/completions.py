"""``POST /v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import Response

from service.api.context import Context, get_context
from service.api.errors import ApiError, internal_error
from service.api.schemas import Choice, Completion, CompletionRequest, Usage, parse_budget_header
from service.api.streaming import DONE, EventStreamResponse, event, unless_disconnected
from service.engine.budget import ComputeBudget, grant
from service.engine.engine_thread import EngineBusyError, EngineStoppedError, OutputStream
from service.engine.sequence import FinishReason, SamplingParams, Sequence

router = APIRouter()

_FAILED = (FinishReason.ERROR, FinishReason.ABORT)


@router.post("/v1/completions", response_model=None)
async def create_completion(
    request: Request,
    body: CompletionRequest,
    context: Annotated[Context, Depends(get_context)],
    x_compute_budget: Annotated[str | None, Header()] = None,
) -> Response:
    """Generate text after a prompt within a compute budget; streamed as server-sent events on request."""
    sequence = build_sequence(context, body, x_compute_budget)
    answer = Answer(context, sequence, admit(context, sequence))
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStreamResponse(answer.events(include_usage=include_usage), on_close=answer.outputs.close)
    try:
        completion = await unless_disconnected(request, answer.whole())
    finally:
        answer.outputs.close()
    if completion is None:  # nobody is there to read this
        return Response(status_code=499)
    return Response(completion.model_dump_json(), media_type="application/json")


def build_sequence(context: Context, body: CompletionRequest, budget_header: str | None) -> Sequence:
    """The engine's form of a request.

    Raises:
        ApiError: a field is out of the server's limits, or the model is not the one that is served.
    """
    if body.model not in (None, context.model_name):
        message = f"the model {body.model!r:.80} does not exist; this server has {context.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    settings = context.settings
    prompt = context.tokenizer.encode(body.prompt)
    if len(prompt) - 1 > settings.max_prompt_bytes:
        message = f"prompt: at most {settings.max_prompt_bytes} bytes are taken, not {len(prompt) - 1}"
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    if body.max_tokens > settings.max_tokens:
        message = f"max_tokens: at most {settings.max_tokens} are generated per request, not {body.max_tokens}"
        raise ApiError(400, message, param="max_tokens")
    params = SamplingParams(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=body.seed,
        stop=tuple(stop.encode("utf-8") for stop in body.stop),
        ignore_eos=body.ignore_eos,
    )
    budget = body.compute_budget or _header_budget(budget_header) or ComputeBudget.exactly(settings.default_budget)
    return Sequence(prompt, params, grant(budget, context.cost), arrived=time.monotonic())


def _header_budget(text: str | None) -> ComputeBudget | None:
    if text is None:
        return None
    try:
        return parse_budget_header(text)
    except ValueError as error:
        raise ApiError(400, f"X-Compute-Budget: {error}", param="X-Compute-Budget") from error


def admit(context: Context, sequence: Sequence) -> OutputStream:
    """Hand a sequence to the engine.

    Raises:
        ApiError: 429 if the queue is full, 503 if the server is stopping.
    """
    try:
        return context.engine.open(sequence)
    except EngineBusyError:
        context.metrics.rejected.labels("queue_full").inc()
        message = "the server's queue is full; try again later"
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"}) from None
    except EngineStoppedError:
        context.metrics.rejected.labels("stopping").inc()
        raise stopping() from None


class Answer:
    """Turns what the engine says of one sequence into OpenAI's objects."""

    def __init__(self, context: Context, sequence: Sequence, outputs: OutputStream) -> None:
        self.context = context
        self.sequence = sequence
        self.outputs = outputs
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def completion(self, choices: list[Choice], usage: Usage | None) -> Completion:
        """The answer, or a chunk of it."""
        return Completion(
            id=self._id, created=self._created, model=self.context.model_name, choices=choices, usage=usage
        )

    def usage(self) -> Usage:
        """The bill, once the sequence has ended."""
        read, generated = len(self.sequence.prompt), self.sequence.generated
        return Usage(
            prompt_tokens=read,
            completion_tokens=generated,
            total_tokens=read + generated,
            compute=self.sequence.usage(self.context.cost),
        )

    async def events(self, *, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: text as it comes, the usage if asked for, and the end."""
        drop = frozenset() if include_usage else frozenset({"usage"})
        async for output in self.outputs:
            if output.finish in _FAILED:
                yield event(failure(output.finish).body())
                break
            reason = None if output.finish is None else output.finish.value
            yield event(self.completion([Choice(text=output.text, finish_reason=reason)], None), drop=drop)
        else:
            if include_usage:
                yield event(self.completion([], self.usage()))
        yield DONE

    async def whole(self) -> Completion:
        """The answer in one piece.

        Raises:
            ApiError: the engine failed, or the server stopped.
        """
        text = "".join([output.text async for output in self.outputs])
        reason = self.sequence.finish
        assert reason is not None, "the last output ends the sequence"
        if reason in _FAILED:
            raise failure(reason)
        return self.completion([Choice(text=text, finish_reason=reason.value)], self.usage())


def failure(reason: FinishReason | None) -> ApiError:
    """The error of a request that the engine ended without an answer."""
    return internal_error() if reason is FinishReason.ERROR else stopping()


def stopping() -> ApiError:
    """For a request that the server cannot take because it is going down."""
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})
