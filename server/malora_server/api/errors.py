"""OpenAI's error object for every status the server sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    422: "unprocessable_request",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
}
_VALIDATION_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "json_invalid": "invalid_json",
}
_MAX_JOINED_MESSAGES = 4


class ApiError(Exception):
    """Ends a request with `status` and an error object; `message` goes to the client as it is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or _CODES.get(status, "error")
        self.param = param
        self.headers = headers

    def body(self) -> bytes:
        """The error object as JSON."""
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, fallback),
            "param": self.param,
            "code": self.code,
        }
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        """The whole reply."""
        return Response(
            self.body(),
            self.status,
            headers=dict(self.headers or {}),
            media_type="application/json",
        )


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 about one field of the request."""
    return ApiError(400, message, code=code, param=param)


def engine_dead(message: str, retry_after: int) -> ApiError:
    """A 503 while there is no engine. retry_after: seconds in which there should be one."""
    return ApiError(503, message, code="engine_dead", headers={"Retry-After": str(retry_after)})


def internal_error() -> ApiError:
    """What a client learns of a fault of ours: nothing but that it happened."""
    return ApiError(500, "The server failed to answer this request; its log says why.")


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every failure with an error object."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    if status == 400:
        # FastAPI's for a body that breaks the JSON parser: no UTF-8, or nested too deeply.
        message = "The body can't be read: it must be a JSON object in UTF-8."
        return ApiError(status, message, code="invalid_json").response()
    if status == 404:
        message = f"There is no route {request.url.path}."
    elif status == 405:
        message = f"{request.url.path} does not answer to {request.method}."
    else:
        message = str(error.detail or HTTPStatus(status).phrase)
    return ApiError(status, message, headers=error.headers).response()


async def _on_validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors()).response()


def validation_error(errors: Sequence[Any]) -> ApiError:
    """A 400 for pydantic's errors of a body, about the first field that has any."""
    first = errors[0]
    code = _VALIDATION_CODES.get(first["type"], "invalid_value")
    if code == "invalid_json":
        return ApiError(
            400, f"The body is not JSON: {first.get('ctx', {}).get('error', '')}.", code=code
        )
    top = first["loc"][:2]
    if len(top) < 2:
        return ApiError(
            400,
            "The body must be a JSON object, sent as Content-Type: application/json.",
            code="invalid_json",
        )
    of_field = [error for error in errors if error["loc"][:2] == top]
    param = _dotted(_common_prefix([error["loc"] for error in of_field])[1:])
    if code == "unknown_parameter":
        return invalid(param, f"Unknown parameter: {param}.", code)
    if code == "missing_required_parameter":
        return invalid(param, f"Missing required parameter: {param}.", code)
    messages = dict.fromkeys(
        error["msg"].removeprefix("Value error, ") for error in of_field[:_MAX_JOINED_MESSAGES]
    )
    return invalid(param, f"Invalid value for {param}: {'; or: '.join(messages)}.", code)


def _common_prefix(locations: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    # The branches of a union put their own names at the end of a location.
    prefix = locations[0]
    for location in locations[1:]:
        shared = 0
        for ours, theirs in zip(prefix, location, strict=False):
            if ours != theirs:
                break
            shared += 1
        prefix = prefix[:shared]
    return prefix


def _dotted(location: tuple[Any, ...]) -> str:
    text = ""
    for part in location:
        if part == "[key]":  # pydantic's mark for a key that is wrong, rather than its value
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
