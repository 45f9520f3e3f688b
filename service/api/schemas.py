"""Requests and responses of the API."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.engine.budget import ComputeBudget
from service.engine.sequence import ComputeUsage

# Fields of OpenAI's API, or of other servers, that change the answer and are not built here, with the values that
# leave it as it is. Anything else is refused: a field is honoured or rejected, never ignored.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": (None,),
    "suffix": ("",),
    "top_k": (0, -1),
}

_MOST_STOPS = 16
_LONGEST_STOP = 256


def parse_budget(value: object) -> ComputeBudget:
    """A budget from JSON: a number in (0, 1], or an object with ``target`` and, optionally, ``min``.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, ComputeBudget):
        return value
    if _is_number(value):
        return ComputeBudget.exactly(_share(value))
    if isinstance(value, dict):
        if set(value) - {"target", "min"} or not {"target"} <= set(value) or not all(map(_is_number, value.values())):
            raise ValueError('an object must read {"target": number, "min": number}, min being optional')
        target = _share(value["target"])
        return ComputeBudget(target, _share(value.get("min", target)))
    raise ValueError('must be a number greater than 0 and at most 1, or {"target": number, "min": number}')


def parse_budget_header(text: str) -> ComputeBudget:
    """A budget from the header ``X-Compute-Budget``: JSON, as in the body. Raises as :func:`parse_budget`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return parse_budget(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _share(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")  # an integer of hundreds of digits; refused as too large


def _as_text(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not text") from None
    return value


def _parse_stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > _MOST_STOPS:
        raise ValueError(f"at most {_MOST_STOPS} stop strings are taken, not {len(stops)}")
    for stop in stops:
        size = len(_as_text(stop).encode("utf-8"))
        if not 1 <= size <= _LONGEST_STOP:
            raise ValueError(f"a stop string must have 1 to {_LONGEST_STOP} bytes, not {size}")
    return tuple(stops)


def _refusal(param: str, message: str) -> PydanticCustomError:
    """An error about the request as a whole, with the field that it is about."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False
    """Send a last chunk with ``usage``."""


class CompletionRequest(BaseModel):
    """Body of ``POST /v1/completions``. Fields that OpenAI does not have, and that mean nothing here, are ignored."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)

    model: str | None = None
    prompt: Annotated[str, AfterValidator(_as_text)]
    max_tokens: int = Field(default=16, ge=1, le=1 << 31)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(1 << 63), le=(1 << 63) - 1)
    stop: Annotated[tuple[str, ...], BeforeValidator(_parse_stop)] = ()
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    compute_budget: Annotated[
        ComputeBudget | None,
        BeforeValidator(lambda value: None if value is None else parse_budget(value)),
        Field(json_schema_extra={"description": "a number in (0, 1], or an object with target and min"}),
    ] = None

    best_of: Any = None
    echo: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    min_p: Any = None
    min_tokens: Any = None
    n: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None
    response_format: Any = None
    suffix: Any = None
    top_k: Any = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """Drop nulls (OpenAI's clients send them for "not set"), and refuse a budget that would be ignored."""
        if not isinstance(data, dict):
            return data
        for field in data:
            if "budget" in field.lower() and field != "compute_budget":
                name = field[:40].encode("utf-8", "replace").decode("utf-8")
                raise _refusal(name, f"{name} is not a field; the budget goes into compute_budget")
        return {name: value for name, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise _refusal("stream_options", "stream_options is only allowed when stream is true")
        return self

    @field_validator(*_NEUTRAL)
    @classmethod
    def _supported(cls, value: object, info: ValidationInfo) -> object:
        neutral = _NEUTRAL[str(info.field_name)]
        if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral):
            raise ValueError(f"{value!r:.40} is not supported; leave it out, or send {neutral[-1]!r}")
        return value


class Usage(BaseModel):
    """What a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    compute: ComputeUsage


class Choice(BaseModel):
    """One generated text, or a piece of it."""

    index: int = 0
    text: str
    logprobs: None = None
    finish_reason: str | None


class Completion(BaseModel):
    """Answer of ``POST /v1/completions``, whole or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rheostat"
    max_model_len: int
    """Prompt and generated tokens that one request may have."""
    compute_floor: float
    """The lowest share of full resolution at which the model generates."""


class ModelList(BaseModel):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
