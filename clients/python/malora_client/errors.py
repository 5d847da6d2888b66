"""What can go wrong, as classes: catch `MaloraError` for all, or the one you can act on."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
from pydantic_core import from_json


class MaloraError(Exception):
    """Anything this client raises on its own account."""


class APIError(MaloraError):
    """A request failed. `type`, `param` and `code` are the server's own, None where it sent none.

    `code` is stable and made for programs (`model_not_found`); `message` is for people;
    `request_id` finds the request in the server's log.
    """

    def __init__(
        self,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.request_id = request_id

    def _details(self) -> list[str]:
        details = [f"code {self.code}"] if self.code else []
        return details + ([f"request {self.request_id}"] if self.request_id else [])

    def __str__(self) -> str:
        details = self._details()
        return f"{self.message} ({', '.join(details)})" if details else self.message


class APIConnectionError(APIError):
    """The server could not be reached, or the connection broke before the reply was whole."""


class APITimeoutError(APIConnectionError):
    """The server took longer than `timeout` allows."""


class APIStatusError(APIError):
    """The server refused or failed the request: HTTP 4xx or 5xx, or an error within a stream.

    An error that arrives within a stream has no HTTP status of its own; `status_code` is then
    the one that the server would have sent with it.
    """

    status_code: int

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, type=type, param=param, code=code, request_id=request_id)
        if status_code is not None:
            self.status_code = status_code

    def _details(self) -> list[str]:
        return [f"HTTP {self.status_code}", *super()._details()]


class BadRequestError(APIStatusError):
    """400: a field's value cannot be served; `param` names it."""

    status_code = 400


class AuthenticationError(APIStatusError):
    """401: no API key, or a wrong one."""

    status_code = 401


class PermissionDeniedError(APIStatusError):
    """403: the key may not do this."""

    status_code = 403


class NotFoundError(APIStatusError):
    """404: no such model, adapter or route."""

    status_code = 404


class ConflictError(APIStatusError):
    """409: the adapter is changing right now."""

    status_code = 409


class PayloadTooLargeError(APIStatusError):
    """413: the request's body is larger than the server takes."""

    status_code = 413


class UnprocessableEntityError(APIStatusError):
    """422: the body is not of the expected form."""

    status_code = 422


class RateLimitError(APIStatusError):
    """429: the server's queue is full; try again later."""

    status_code = 429


class InternalServerError(APIStatusError):
    """5xx: the server failed."""

    status_code = 500


_BY_STATUS: dict[int, type[APIStatusError]] = {
    cls.status_code: cls
    for cls in (
        BadRequestError,
        AuthenticationError,
        PermissionDeniedError,
        NotFoundError,
        ConflictError,
        PayloadTooLargeError,
        UnprocessableEntityError,
        RateLimitError,
    )
}

_BY_TYPE: dict[str, type[APIStatusError]] = {
    "invalid_request_error": BadRequestError,
    "authentication_error": AuthenticationError,
    "permission_error": PermissionDeniedError,
    "rate_limit_error": RateLimitError,
}


def status_error(response: httpx.Response) -> APIStatusError:
    """The error that a refused request stands for; the response's body must have been read."""
    status = response.status_code
    cls = InternalServerError if status >= 500 else _BY_STATUS.get(status, APIStatusError)
    try:
        body = from_json(response.content)
    except ValueError:
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        # Not our server's words: a proxy's page, say. Its first line is still the best hint.
        text = response.text.strip()[:200]
        error = {"message": text or response.reason_phrase or "The server sent no explanation."}
    return _build(cls, error, status, response.headers.get("x-request-id"))


def stream_error(error: object, request_id: str | None) -> APIStatusError:
    """The error that an `{"error": …}` event within a stream stands for, by its `type`."""
    if not isinstance(error, Mapping):
        error = {"message": str(error)}
    cls = _BY_TYPE.get(str(error.get("type")), InternalServerError)
    return _build(cls, error, None, request_id)


def connection_error(exc: httpx.RequestError) -> APIConnectionError:
    """The error that a failed exchange stands for; names the host, never the credentials."""
    url = exc.request.url
    server = f"{url.scheme}://{url.netloc.decode('ascii')}"
    if isinstance(exc, httpx.TimeoutException):
        kind = type(exc).__name__.removesuffix("Timeout").lower()
        return APITimeoutError(
            f"The {kind} timeout for {server} ran out; raise it, or look at the server's load."
        )
    reason = str(exc) or type(exc).__name__
    return APIConnectionError(f"The connection to {server} failed: {reason}")


def _build(
    cls: type[APIStatusError],
    error: Mapping[str, object],
    status_code: int | None,
    request_id: str | None,
) -> APIStatusError:
    def text(key: str) -> str | None:
        value = error.get(key)
        return None if value is None else str(value)

    return cls(
        text("message") or "The server sent no explanation.",
        status_code=status_code,
        type=text("type"),
        param=text("param"),
        code=text("code"),
        request_id=request_id,
    )
