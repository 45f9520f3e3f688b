"""Models, tokens, health, version, errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict
from pydantic.json_schema import WithJsonSchema

from service.api.schemas.fields import ApiModel, Request, Text
from service.api.schemas.prompt import TOKEN_SCHEMA, parse_ids


class ModelCard(ApiModel):
    """One served model."""

    id: str
    """Its name, for `model`."""
    object: Literal["model"] = "model"
    """Always `model`."""
    created: int
    """Unix time in seconds at which the server started."""
    owned_by: str = "rheostat"
    """Always `rheostat`."""
    max_model_len: int
    """Prompt and generated tokens that one request may have."""
    compute_floor: float
    """The lowest share of full resolution at which the model generates."""
    adapted: bool
    """Whether the model was trained for budgets below 1; if not, they are kept, but answers get worse."""


class ModelList(ApiModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    """Always `list`."""
    data: list[ModelCard]
    """The one model that is served."""


class TokenizeRequest(Request):
    """Body of `POST /tokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "é"}]})

    prompt: Text
    """The text."""
    add_special_tokens: bool = True
    """Begin as every prompt does: with the separator, 256, or as the tokenizer of a converted model says."""
    model: str | None = None
    """The served model; another name is a 404."""


class Tokenized(ApiModel):
    """Answer of `POST /tokenize`."""

    count: int
    """How many tokens there are."""
    max_model_len: int
    """Prompt and generated tokens that a request may have."""
    tokens: list[int]
    """Their ids."""


def _parse_tokens(value: object) -> list[int]:
    if not isinstance(value, list):
        raise ValueError("must be a list of token ids")
    return list(parse_ids(value))


class DetokenizeRequest(Request):
    """Body of `POST /detokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [256, 195, 169]}]})

    tokens: Annotated[
        list[int], BeforeValidator(_parse_tokens), WithJsonSchema({"type": "array", "items": TOKEN_SCHEMA})
    ]
    """Ids of the model's vocabulary; special tokens are left out, invalid UTF-8 becomes U+FFFD."""
    model: str | None = None
    """The served model; another name is a 404."""


class Detokenized(ApiModel):
    """Answer of `POST /detokenize`."""

    prompt: str
    """The text."""


class TokenizerInfo(ApiModel):
    """Answer of `GET /tokenizer_info`: what clients that count tokens must know."""

    tokenizer_class: str
    """`ByteTokenizer`, or `SubwordTokenizer` of a converted model."""
    vocab_size: int
    """Ids are 0 to this, not included."""
    bos_token_id: int
    """The token that begins a prompt where nothing else does."""
    eos_token_id: int | None
    """A token that ends an answer; null where none does."""
    bos_token: str | None
    """Its text; null where no text stands for it, as for the separator of a model of bytes."""
    eos_token: str | None
    """Its text; null where no text stands for it."""


class Version(ApiModel):
    """Answer of `GET /version`."""

    version: str
    """Of the server."""


class Health(ApiModel):
    """Answer of the health routes while all is well."""

    status: Literal["ok"] = "ok"
    """Always `ok`."""


class ErrorDetail(ApiModel):
    """An error, as OpenAI describes it."""

    message: str
    """For people."""
    type: str
    """The kind of error, by its status."""
    param: str | None
    """The field at fault."""
    code: str | None
    """For programs; null where the status says it all."""


class ErrorBody(ApiModel):
    """Body of every answer that is not 2xx."""

    error: ErrorDetail
    """What is wrong."""
