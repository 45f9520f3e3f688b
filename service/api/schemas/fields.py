"""What the fields of several requests have in common: null, text, budgets, stop strings, refusals."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue, WithJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError

from service.engine.budget import ComputeBudget

MOST_STOPS = 16
LONGEST_STOP = 256


class ApiModel(BaseModel):
    """Base of every answer; docstrings under fields become descriptions in the OpenAPI document."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Request(BaseModel):
    """Base of every request body.

    Nulls count as absent, as OpenAI's clients mean them. Fields in ``NEUTRAL`` belong to OpenAI's API, or to other
    servers, change the answer, and are not built here: they are taken with a value that leaves the answer as it is,
    and refused with any other. A budget in an unknown field is refused. Other unknown fields are ignored.
    """

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True, use_attribute_docstrings=True)

    NEUTRAL: ClassVar[dict[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {name: whole(value) for name, value in data.items() if value is not None}
        for name, value in data.items():
            if "budget" in name.lower() and name not in cls.model_fields:
                shown = name[:40].encode("utf-8", "replace").decode("utf-8")
                where = " or ".join(field for field in cls.model_fields if "budget" in field) or "another request"
                raise refusal(shown, f"{shown} is not a field; a budget goes into {where}")
            neutral = cls.NEUTRAL.get(name)
            if neutral is not None and not any(_same(value, other) for other in neutral):
                raise refusal(
                    name, f"{name}: {value!r:.40} is not supported; leave it out, or send {json.dumps(neutral[-1])}"
                )
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema, with null allowed wherever a field may be left out."""
        described = handler.resolve_ref_schema(handler(schema))
        required = described.get("required", [])
        for name, field in described.get("properties", {}).items():
            options = field.get("anyOf", [])
            if name not in required and {"type": "null"} not in options:
                notes = {key: field.pop(key) for key in ("title", "description", "default", "examples") if key in field}
                described["properties"][name] = notes | {"anyOf": [*(options or [field]), {"type": "null"}]}
        return described


def whole(value: Any) -> Any:
    """JSON has one kind of number, in which 2.0 is the integer 2; anything but such a number is returned as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _same(value: object, other: object) -> bool:
    """Equal, and not a boolean beside a number."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def refusal(param: str, message: str) -> PydanticCustomError:
    """An error about the request as a whole, with the field that it is about."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


def implies(field: str, value: JsonSchemaValue, other: str) -> JsonSchemaValue:
    """The JSON schema of a rule: where ``field`` is like ``value``, ``other`` is true."""
    return {
        "if": {"properties": {field: value}, "required": [field]},
        "then": {"properties": {other: {"const": True}}, "required": [other]},
    }


def as_text(value: str) -> str:
    """The value, if UTF-8 can carry it.

    Raises:
        ValueError: it holds a lone surrogate.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not text") from None
    return value


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


def _parse_stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, tuple):  # the default
        return stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if len(stops) > MOST_STOPS:
        raise ValueError(f"at most {MOST_STOPS} stop strings are taken, not {len(stops)}")
    for stop in stops:
        size = len(as_text(stop).encode("utf-8"))
        if not 1 <= size <= LONGEST_STOP:
            raise ValueError(f"a stop string must have 1 to {LONGEST_STOP} bytes, not {size}")
    return tuple(stops)


_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
SHARE_SCHEMA = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}

Text = Annotated[str, AfterValidator(as_text)]

StopStrings = Annotated[
    tuple[str, ...],
    BeforeValidator(_parse_stop),
    WithJsonSchema({"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MOST_STOPS}]}),
]

Budget = Annotated[
    ComputeBudget,
    BeforeValidator(parse_budget),
    WithJsonSchema(
        {
            "anyOf": [
                SHARE_SCHEMA,
                {
                    "type": "object",
                    "properties": {"target": SHARE_SCHEMA, "min": SHARE_SCHEMA},
                    "required": ["target"],
                    "additionalProperties": False,
                },
            ],
        }
    ),
]
