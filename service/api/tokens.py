"""Text to tokens and back."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from service.api.context import ContextDependency
from service.api.errors import ERRORS
from service.api.requests import check_ids, check_length, check_model
from service.api.schemas.system import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest

router = APIRouter(tags=["tokens"], responses=ERRORS)


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, context: ContextDependency) -> Tokenized:
    """The token ids of a text, as a prompt begins them."""
    check_model(context, body.model)
    tokens = await run_in_threadpool(context.tokenizer.tokens, body.prompt)
    if body.add_special_tokens:
        tokens = context.tokenizer.begin(tokens, text=True)
    check_length(context, "prompt", tokens)
    return Tokenized(count=len(tokens), max_model_len=context.max_model_len, tokens=tokens)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, context: ContextDependency) -> Detokenized:
    """The text of token ids."""
    check_model(context, body.model)
    check_length(context, "tokens", body.tokens)
    check_ids(context, "tokens", body.tokens)
    return Detokenized(prompt=context.tokenizer.decode(body.tokens))
