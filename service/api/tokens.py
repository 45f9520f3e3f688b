"""Text to tokens and back."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.auth import KeyedRoute
from service.api.context import ContextDependency
from service.api.errors import ERRORS
from service.api.requests import check_length, check_model
from service.api.schemas.system import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest, TokenizerInfo

router = APIRouter(tags=["tokens"], responses=ERRORS, route_class=KeyedRoute)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, context: ContextDependency) -> Tokenized:
    """The token ids of a text: its UTF-8 bytes, after the document separator."""
    check_model(context, body.model)
    tokens = context.tokenizer.encode(body.prompt)
    check_length(context, "prompt", len(tokens) - 1)
    if not body.add_special_tokens:
        del tokens[0]
    return Tokenized(count=len(tokens), max_model_len=context.max_model_len, tokens=tokens)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, context: ContextDependency) -> Detokenized:
    """The text of token ids."""
    check_model(context, body.model)
    check_length(context, "tokens", len(body.tokens) - 1)
    return Detokenized(prompt=context.tokenizer.decode(body.tokens))


@router.get("/tokenizer_info")
async def tokenizer_info() -> TokenizerInfo:
    """What the tokens are, for clients that ask the server instead of loading a tokenizer."""
    return TokenizerInfo()
