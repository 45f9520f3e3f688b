"""From checked fields to sequences, and into the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from typing import Annotated

from fastapi import Header
from pydantic.json_schema import WithJsonSchema

from service.api.context import Context
from service.api.errors import ApiError, internal_error
from service.api.request_log import current_record
from service.api.schemas.fields import SHARE_SCHEMA, parse_budget_header
from service.api.schemas.generation import MOST_CHOICES, GenerationRequest
from service.engine.budget import BudgetAboveMaximumError, ComputeBudget, Grant, grant
from service.engine.engine_thread import EngineBusyError, EngineStoppedError, OutputStream
from service.engine.sequence import FinishReason, SamplingParams, Sequence, SharedPrompt
from service.keys import ApiKey

LONGEST_RETRY = 60
"""Seconds that a client is told to wait, at most."""

BudgetHeader = Annotated[
    str | None,
    Header(description='A compute budget as JSON, also as `{"target": number, "min": number}`; the body wins.'),
    WithJsonSchema(SHARE_SCHEMA),
]

_BUDGET_HEADER = "X-Compute-Budget"
_SCORED_PROMPTS = 2
"""How often ``max_prompt_bytes`` may be scored in one request: every position is an entry in the answer."""


def check_model(context: Context, name: str | None) -> None:
    """Refuse a request for another model.

    Raises:
        ApiError: 404.
    """
    if name not in (None, context.model_name):
        message = f"the model {name!r:.80} does not exist; this server has {context.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def choose_grant(context: Context, key: ApiKey | None, body: GenerationRequest, budget_header: str | None) -> Grant:
    """The grant for what a request asks in its body, else in its header, else for its key's or the server's default.

    Raises:
        ApiError: 400, the header is no budget; 403, the key's maximum does not allow it.
    """
    field, asked = "compute_budget", body.compute_budget
    stated = (
        None if budget_header is None else _checked(budget_header)
    )  # a bad one is refused, even where the body wins
    if asked is None and stated is not None:
        field, asked = _BUDGET_HEADER, stated
    maximum = 1.0 if key is None else key.maximum_budget
    if asked is None:
        default = key.default_budget if key is not None else None
        asked = ComputeBudget.exactly(default or min(context.settings.default_budget, maximum))
    try:
        return grant(asked, context.cost, maximum)
    except BudgetAboveMaximumError as error:
        raise ApiError(403, f"{field}: {error}", param=field, code="budget_above_maximum") from None


def _checked(budget_header: str) -> ComputeBudget:
    try:
        return parse_budget_header(budget_header)
    except ValueError as error:
        raise ApiError(400, f"{_BUDGET_HEADER}: {error}", param=_BUDGET_HEADER) from error


def sampling_params(body: GenerationRequest, max_tokens: int, stop: Collection[str]) -> SamplingParams:
    """How to draw, as a request says; the rest as by default."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
        stop=tuple(text.encode("utf-8") for text in stop),
        ignore_eos=body.ignore_eos,
    )


def make_choices(
    context: Context,
    prompt: list[int],
    params: SamplingParams,
    body: GenerationRequest,
    key: ApiKey | None,
    given: Grant,
) -> list[Sequence]:
    """The ``n`` choices after one prompt; it is read once for all of them."""
    arrived = time.monotonic()
    shared = SharedPrompt() if body.n > 1 else None
    return [
        Sequence(
            prompt,
            params.of_choice(choice),
            given,
            arrived=arrived,
            tokenizer=context.tokenizer,
            priority=body.priority,
            choice=choice,
            shared=shared,
            salt="" if key is None else key.name,
        )
        for choice in range(body.n)
    ]


def check_limits(
    context: Context,
    prompts: Collection[list[int]],
    n: int,
    params: SamplingParams,
    length: str,
    prompt_field: str = "prompt",
) -> None:
    """Hold a request against the server's limits before anything is made of it.

    Args:
        prompts: tokens. n: choices of each. length: the field that says how much to
            generate. prompt_field: the one that says after what.

    Raises:
        ApiError: 400.
    """
    settings = context.settings
    choices, room = n * len(prompts), min(MOST_CHOICES, settings.max_running + settings.max_waiting)
    if choices > room:
        param = "n" if n > 1 else prompt_field
        raise ApiError(400, f"{param}: at most {room} choices are made per request, not {choices}", param=param)
    limit = settings.max_prompt_bytes
    for prompt in prompts:
        check_length(context, prompt_field, prompt)
    scored = n * sum(_size(context, prompt) for prompt in prompts) if params.score_prompt else 0
    if scored > _SCORED_PROMPTS * limit:
        unit = context.tokenizer.unit
        message = f"logprobs: at most {_SCORED_PROMPTS * limit} prompt {unit}s are scored per request, not {scored}"
        raise ApiError(400, message, param="logprobs", code="context_length_exceeded")
    check_generated(context, length, params.max_tokens)


def check_generated(context: Context, param: str, count: int) -> None:
    """Refuse to generate more than the server does.

    Raises:
        ApiError: 400.
    """
    limit = context.settings.max_tokens
    if count > limit:
        message = f"{param}: at most {limit} are generated per choice, not {count}"
        raise ApiError(400, message, param=param)


def check_ids(context: Context, param: str, ids: Collection[int]) -> None:
    """Refuse ids that are none of the model's.

    Raises:
        ApiError: 400.
    """
    most = context.tokenizer.vocab_size - 1
    wrong = next((place for place, token in enumerate(ids) if not 0 <= token <= most), None)
    if wrong is not None:
        message = f"{param}: token ids are 0 to {most}, and the one at index {wrong} is not"
        raise ApiError(400, message, param=param)


def _size(context: Context, tokens: list[int]) -> int:
    """Tokens of a prompt, without the one that begins every sequence."""
    return len(tokens) - (tokens[:1] == [context.tokenizer.start])


def check_length(context: Context, param: str, tokens: list[int], most: int | None = None) -> None:
    """Refuse a text that is longer than the server reads, or than ``most`` if that is less.

    Raises:
        ApiError: 400.
    """
    limit = context.settings.max_prompt_bytes if most is None else min(most, context.settings.max_prompt_bytes)
    size = _size(context, tokens)
    if size > limit:
        message = f"{param}: at most {limit} {context.tokenizer.unit}s are taken, not {size}"
        raise ApiError(400, message, param=param, code="context_length_exceeded")


def admit(context: Context, sequences: Collection[Sequence], *, whole: bool) -> OutputStream:
    """Hand the sequences of one request to the engine, all or none, and put them on its bill.

    ``whole``: nobody reads of a sequence before it has ended.

    Raises:
        ApiError: 429 if the queue is full, 503 if the server is stopping.
    """
    try:
        outputs = context.engine.open(sequences, whole=whole)
    except EngineBusyError as busy:
        context.metrics.rejected["queue_full"].inc()
        message = "the server's queue is full; try again later"
        retry = min(max(1, math.ceil(busy.retry_seconds)), LONGEST_RETRY)
        raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(retry)}) from None
    except EngineStoppedError:
        context.metrics.rejected["stopping"].inc()
        raise stopping() from None
    current_record.get().follow(outputs)
    return outputs


def failure(reason: FinishReason | None) -> ApiError | None:
    """The error of a request that the engine ended without an answer; None where it has one."""
    match reason:
        case FinishReason.ERROR:
            return internal_error()
        case FinishReason.ABORT:
            return stopping()
        case FinishReason.QUEUE_TIMEOUT:
            message = "the request waited too long for its turn; try again later"
            return ApiError(503, message, code="queue_timeout", headers={"Retry-After": "5"})
        case FinishReason.TIMEOUT:
            return ApiError(504, "the request took longer than the server allows", code="timeout")
        case _:
            return None


def stopping() -> ApiError:
    """For a request that comes while the server is going down, or while its engine is stuck."""
    return ApiError(503, "the server takes no requests at the moment", code="stopping", headers={"Retry-After": "5"})
