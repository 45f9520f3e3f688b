"""From what the engine says of the choices of one request to the answer, whole or in events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from fastapi import Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from service.api.context import Context
from service.api.requests import admit, failure
from service.api.schemas.generation import GenerationRequest, PromptTokensDetails, Usage
from service.api.streaming import DONE, EventStreamResponse, event, unless_disconnected
from service.engine.budget import NOT_ADAPTED
from service.engine.sequence import ComputeUsage, FinishReason, Sequence, TokenScore, total_usage


@dataclass(slots=True)
class Piece:
    """What one choice got: in one step, or in all."""

    index: int
    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    finish: FinishReason | None = None
    compute: ComputeUsage | None = None
    """On the last piece of a choice that is not the only one."""

    @property
    def reason(self) -> Literal["stop", "length"] | None:
        """The finish reason that a client sees."""
        reasons: dict[FinishReason | None, Literal["stop", "length"]] = {
            FinishReason.STOP: "stop",
            FinishReason.LENGTH: "length",
        }
        return reasons.get(self.finish)


class Shape(Protocol):
    """How a kind of answer looks."""

    def whole(self, pieces: list[Piece], usage: Usage) -> BaseModel:
        """The answer, from one piece per choice."""

    def chunks(self, piece: Piece) -> Iterable[BaseModel]:
        """The chunks of a stream that one step of a choice makes."""

    def closing(self, usage: Usage) -> BaseModel:
        """The chunk that carries the usage."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What every object of one answer says of it."""

    id: str
    created: int
    """Unix time in seconds."""
    model: str

    @classmethod
    def new(cls, kind: str, model: str) -> Identity:
        """That of an answer of this kind that begins now."""
        return cls(f"{kind}-{uuid.uuid4().hex}", int(time.time()), model)


class Generation:
    """The choices of one request while the engine works on them."""

    def __init__(self, context: Context, sequences: list[Sequence], body: GenerationRequest) -> None:
        """Hand the sequences to the engine. Raises as :func:`service.api.requests.admit`."""
        self._context = context
        self._sequences = sequences
        self._index = {sequence: index for index, sequence in enumerate(sequences)}
        self._body = body
        self._outputs = admit(context, sequences, whole=not body.stream)

    async def respond(self, request: Request, shape: Shape) -> Response:
        """The answer; a stream goes on after this returns.

        Raises:
            ApiError: the engine failed, or the server stopped.
        """
        if self._body.stream:
            events = self._events(shape, include_usage=self._body.include_usage)
            return EventStreamResponse(events, on_close=self._outputs.close)
        return await respond_whole(request, self._whole(shape), self._outputs.close)

    async def _pieces(self) -> AsyncIterator[Piece]:
        """News of the choices as they come."""
        several = len(self._sequences) > 1
        async for output in self._outputs:
            compute = output.sequence.usage() if several and output.finish is not None else None
            yield Piece(self._index[output.sequence], output.text, output.scores, output.finish, compute)

    async def _events(self, shape: Shape, *, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events: text as it comes, the usage if asked for, and the end."""
        drop = frozenset() if include_usage else frozenset({"usage"})
        async for piece in self._pieces():
            error = failure(piece.finish)
            if error is not None:  # one choice that fails ends them all: half an answer is none
                yield event(error.body())
                break
            for chunk in shape.chunks(piece):
                yield event(chunk, drop=drop)
        else:
            if include_usage:
                yield event(shape.closing(self._usage()))
        yield DONE

    async def _whole(self, shape: Shape) -> Callable[[], BaseModel]:
        """What makes the answer, once every choice has ended.

        Raises:
            ApiError: the engine failed, or the server stopped.
        """
        wholes = [Piece(index) for index in range(len(self._sequences))]
        texts: list[list[str]] = [[] for _ in wholes]
        async for piece in self._pieces():
            error = failure(piece.finish)
            if error is not None:
                raise error
            texts[piece.index].append(piece.text)
            whole = wholes[piece.index]
            whole.scores += piece.scores
            whole.finish, whole.compute = piece.finish, piece.compute
        for whole, parts in zip(wholes, texts, strict=True):
            whole.text = "".join(parts)
        return partial(shape.whole, wholes, self._usage())

    def _usage(self) -> Usage:
        """The bill, once every choice has ended."""
        prompts = [sequence for sequence in self._sequences if sequence.choice == 0]
        read = sum(len(sequence.prompt) for sequence in prompts)
        cached = sum(s.inherited for s in self._sequences if s.shared is None or s.shared.reader is s)
        generated = sum(sequence.generated for sequence in self._sequences)
        scored = any(sequence.params.score_prompt for sequence in self._sequences)
        compute = total_usage(self._sequences)
        return Usage(
            prompt_tokens=read,
            completion_tokens=generated,
            total_tokens=read + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached, scored_tokens=read if scored else 0),
            compute=compute,
            note=None if self._context.adapted or compute.granted >= 1.0 else NOT_ADAPTED,
        )


async def respond_whole(
    request: Request, work: Coroutine[Any, Any, Callable[[], BaseModel]], close: Callable[[], None]
) -> Response:
    """The JSON of what ``work`` leads to, given up as soon as the client has gone; ``close`` is called in any case.

    The object is made and written in another thread: the scores of a long prompt would hold up the event loop.
    """
    try:
        make = await unless_disconnected(request, work)
    finally:
        close()
    if make is None:  # nobody is there to read this
        return Response(status_code=499)
    return Response(await run_in_threadpool(lambda: make().model_dump_json()), media_type="application/json")
