"""Errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.api.schemas.system import ErrorBody


class ApiError(Exception):
    """An error that a client sees.

    Args:
        status: HTTP status. message: for people. param: the field at fault. code: for programs. headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body."""
        return error_body(self.status, self.message, self.param, self.code)


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    """``{"error": {"message", "type", "param", "code"}}``."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault; `param` names the field."},
    "5XX": {"model": ErrorBody, "description": "The server is at fault, or is stopping."},
}
"""The OpenAPI entries of every route."""


def internal_error() -> ApiError:
    """For a request that the engine failed; what happened is in the log."""
    return ApiError(500, "the server failed while it worked on this request", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Make every error that a route raises an OpenAI error; unexpected ones are answered by ``RequestLog``."""

    async def api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(), error.status, error.headers)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return JSONResponse(describe(error.errors()).body(), 400)

    async def http_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)


def describe(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, with the field that it is about."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "header")]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "refused":
        return ApiError(400, first["ctx"]["message"], param=first["ctx"]["param"])
    if not where:
        return ApiError(400, f"the body must be a JSON object, sent as application/json: {first['msg']}")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{'.'.join(where)}: {message}", param=where[0])
