"""The OpenAPI document of one server: its limits stand in it as bounds of the fields."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from service.api.schemas.tilings import LONGEST_TEXT
from service.settings import Settings

_KEYWORDS = {"integer": "maximum", "string": "maxLength", "array": "maxItems"}


def with_limits(document: Mapping[str, Any], settings: Settings, vocab_size: int) -> dict[str, Any]:
    """A copy of ``document`` in which no field may be larger than the server takes.

    Token ids end where the vocabulary does. A text is limited in bytes, which JSON Schema cannot say; its ``maxLength``
    is in characters, each at least a byte.
    """
    limited = deepcopy(dict(document))
    prompt, tokens = settings.max_prompt_bytes, settings.max_tokens
    for schema, field, most in (
        ("CompletionRequest", "prompt", prompt),
        ("CompletionRequest", "max_tokens", tokens),
        ("ChatRequest", "max_tokens", tokens),
        ("ChatRequest", "max_completion_tokens", tokens),
        ("TilingsRequest", "text", min(prompt, LONGEST_TEXT)),
        ("TokenizeRequest", "prompt", prompt),
        ("DetokenizeRequest", "tokens", prompt + 1),
    ):
        _bound(limited["components"]["schemas"][schema]["properties"][field], most)
    for schema, field in (("CompletionRequest", "prompt"), ("DetokenizeRequest", "tokens")):
        _bound_ids(limited["components"]["schemas"][schema]["properties"][field], vocab_size - 1)
    return limited


def _bound_ids(schema: dict[str, Any], most: int) -> None:
    """Limit the ids in lists of them."""
    for option in schema.get("anyOf", [schema]):
        items = option.get("items", {})
        if items.get("type") == "integer":
            items["maximum"] = most
        elif items:
            _bound_ids(items, most)


def _bound(schema: dict[str, Any], most: int) -> None:
    """Limit a number, the length of a text or of a list of ids, and of each in a list of them."""
    for option in schema.get("anyOf", [schema]):
        items = option.get("items", {})
        if items.get("type", "integer") == "integer":
            keyword = _KEYWORDS.get(option["type"])
            if keyword is not None:  # null has no size
                option[keyword] = most
        else:
            _bound(items, most)
