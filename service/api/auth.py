"""Who asks, and how often they may."""

from __future__ import annotations

import math
from typing import Annotated

from fastapi import Depends, Request

from service.api.context import ContextDependency
from service.api.errors import ApiError
from service.api.request_log import current_record
from service.keys import ApiKey


async def authenticate(request: Request, context: ContextDependency) -> ApiKey | None:
    """The key that a request came with (``Authorization: Bearer ...``); None where the server has no keys.

    Raises:
        ApiError: 401, the key is missing or unknown.
    """
    if not len(context.keys):
        return None
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    key = context.keys.find(given.strip().encode("latin-1"))  # how Starlette decoded the header's bytes
    if key is None or scheme.lower() != "bearer":
        context.metrics.rejected["unauthorized"].inc()
        message = "this server asks for an API key: Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    current_record.get().key = key.name
    return key


KeyDependency = Annotated[ApiKey | None, Depends(authenticate)]


async def limit_rate(key: KeyDependency, context: ContextDependency) -> None:
    """Count a request against its key's rate.

    Raises:
        ApiError: 429, the key has used up its requests.
    """
    if key is None or key.requests_per_minute is None:
        return
    allowance = context.rates.take(key.name, key.requests_per_minute)
    current_record.get().headers |= {
        "x-ratelimit-limit-requests": str(key.requests_per_minute),
        "x-ratelimit-remaining-requests": str(allowance.remaining),
        "x-ratelimit-reset-requests": f"{allowance.reset_seconds:.3f}s",
    }
    if not allowance.allowed:
        context.metrics.rejected["rate_limit"].inc()
        message = f"this API key may send {key.requests_per_minute} requests per minute; try again later"
        retry = {"Retry-After": str(math.ceil(allowance.retry_seconds))}
        raise ApiError(429, message, code="rate_limit_exceeded", headers=retry)
