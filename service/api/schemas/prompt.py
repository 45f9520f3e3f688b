"""Prompts: text, or token ids, one or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator
from pydantic.json_schema import WithJsonSchema

from service.api.schemas.fields import as_text, whole

MOST_PROMPTS = 128

Prompt = str | tuple[int, ...]
"""Text or token ids."""


def parse_ids(value: Sequence[object]) -> tuple[int, ...]:
    """Token ids from JSON.

    Raises:
        ValueError: an element is no integer. Which integers the model has is for the route to check.
    """
    ids = tuple(token for token in map(whole, value) if isinstance(token, int) and not isinstance(token, bool))
    if len(ids) != len(value):
        raise ValueError("token ids must be integers")
    return ids


def _parse_prompt(value: object) -> list[Prompt]:
    if isinstance(value, str):
        return [as_text(value)]
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if isinstance(value[0], int | float):
        return [parse_ids(value)]
    if len(value) > MOST_PROMPTS:
        raise ValueError(f"at most {MOST_PROMPTS} prompts are taken, not {len(value)}")
    if all(isinstance(part, str) for part in value):
        return [as_text(part) for part in value]
    if all(isinstance(part, list) for part in value):
        return [parse_ids(part) for part in value]
    raise ValueError("a list of prompts must hold only strings, or only lists of token ids")


TOKEN_SCHEMA = {"type": "integer", "minimum": 0}
_IDS_SCHEMA = {"type": "array", "items": TOKEN_SCHEMA}

Prompts = Annotated[
    list[Prompt],
    BeforeValidator(_parse_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MOST_PROMPTS},
                _IDS_SCHEMA | {"minItems": 1},
                {"type": "array", "items": _IDS_SCHEMA, "minItems": 1, "maxItems": MOST_PROMPTS},
            ]
        }
    ),
]
