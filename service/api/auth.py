"""Who asks, and how often they may."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute

from service.api.context import Context, get_context
from service.api.errors import ApiError
from service.api.request_log import current_record
from service.keys import ApiKey


def authenticate(request: Request, context: Context) -> ApiKey | None:
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


def limit_rate(key: ApiKey | None, context: Context) -> None:
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


class KeyedRoute(APIRoute):
    """A route that asks for a key, before anything is made of the body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, behind :meth:`admit`."""
        handle = super().get_route_handler()

        async def admitted(request: Request) -> Response:
            self.admit(request)
            return await handle(request)

        return admitted

    @staticmethod
    def admit(request: Request) -> None:
        """Let a request in, and note its key. Raises as :func:`authenticate`."""
        request.state.key = authenticate(request, get_context(request))


class CountedRoute(KeyedRoute):
    """A route that uses the model, and counts against the key's rate."""

    @staticmethod
    def admit(request: Request) -> None:
        """As for any key, and raises as :func:`limit_rate`."""
        KeyedRoute.admit(request)
        limit_rate(request.state.key, get_context(request))


def admitted_key(request: Request) -> ApiKey | None:
    """The key that a request was let in with."""
    key: ApiKey | None = request.state.key
    return key


KeyDependency = Annotated[ApiKey | None, Depends(admitted_key)]
