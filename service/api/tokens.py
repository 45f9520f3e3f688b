"""Text to tokens and back."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from service.api.auth import KeyedRoute
from service.api.context import ContextDependency
from service.api.errors import ERRORS, ApiError
from service.api.requests import check_ids, check_length, check_model
from service.api.schemas.system import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest, TokenizerInfo

router = APIRouter(tags=["tokens"], responses=ERRORS, route_class=KeyedRoute)


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
    most = context.settings.max_prompt_bytes + 1  # what the longest prompt is made of
    if len(body.tokens) > most:
        message = f"tokens: at most {most} are taken, not {len(body.tokens)}"
        raise ApiError(400, message, param="tokens", code="context_length_exceeded")
    check_ids(context, "tokens", body.tokens)
    return Detokenized(prompt=context.tokenizer.decode(body.tokens))


@router.get("/tokenizer_info")
async def tokenizer_info(context: ContextDependency) -> TokenizerInfo:
    """What the tokens are, for clients that ask the server instead of loading a tokenizer."""
    tokenizer = context.tokenizer
    end = min(tokenizer.ends, default=None)

    def text(token: int | None) -> str | None:
        return tokenizer.token_text(token) if token is not None else None

    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.start,
        eos_token_id=end,
        bos_token=text(tokenizer.start),
        eos_token=text(end),
    )
