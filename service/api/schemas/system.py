"""Models, tokens, health, version, errors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict
from pydantic.json_schema import WithJsonSchema

from model.tokenizer import DOCUMENT, VOCAB_SIZE
from service.api.schemas.fields import ApiModel, Request, Text
from service.api.schemas.prompt import TOKEN_SCHEMA, parse_ids


class ModelCard(ApiModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rheostat"
    max_model_len: int
    """Prompt and generated tokens that one request may have."""
    compute_floor: float
    """The lowest share of full resolution at which the model generates."""
    adapted: bool
    """Whether the model was trained for budgets below 1; if not, they are kept, but answers get worse."""


class ModelList(ApiModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(Request):
    """Body of `POST /tokenize`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "é"}]})

    prompt: Text
    add_special_tokens: bool = True
    """Begin with the document separator, 256, as every prompt does."""
    model: str | None = None
    """The served model; another name is a 404."""


class Tokenized(ApiModel):
    """Answer of `POST /tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]


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
    """Ids from 0 to 256; separators are left out, invalid UTF-8 becomes U+FFFD."""
    model: str | None = None
    """The served model; another name is a 404."""


class Detokenized(ApiModel):
    """Answer of `POST /detokenize`."""

    prompt: str


class TokenizerInfo(ApiModel):
    """Answer of `GET /tokenizer_info`: what clients that count tokens must know."""

    tokenizer_class: Literal["ByteTokenizer"] = "ByteTokenizer"
    vocab_size: int = VOCAB_SIZE
    bos_token_id: int = DOCUMENT
    """The separator that begins every prompt."""
    eos_token_id: int = DOCUMENT
    """The separator that ends a document."""
    bos_token: None = None
    """No text stands for the separator."""
    eos_token: None = None


class Version(ApiModel):
    """Answer of `GET /version`."""

    version: str


class Health(ApiModel):
    """Answer of the health routes while all is well."""

    status: Literal["ok"] = "ok"


class ErrorDetail(ApiModel):
    """An error, as OpenAI describes it."""

    message: str
    type: str
    param: str | None
    """The field at fault."""
    code: str | None


class ErrorBody(ApiModel):
    """Body of every answer that is not 2xx."""

    error: ErrorDetail
