"""Around every request: its id, its log line, its metrics, and the limit on its body (ASGI)."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from malora_server.api.errors import ApiError, internal_error
from malora_server.api.state import RequestRecord
from malora_server.api.streaming import CLIENT_CLOSED_REQUEST
from malora_server.metrics import Metrics

if TYPE_CHECKING:
    from malora_server.api.tracing import Tracing

logger = logging.getLogger("malora_server.requests")

_MAX_DROPPED_BYTES = 64 * 2**20
_MAX_ID_LENGTH = 128
_PROBES = frozenset({"/health", "/metrics"})


class RequestContext:
    """Gives a request its id and its span, answers what nobody caught, logs and counts its end."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = RequestRecord(_request_id(headers))
        span = None
        if self._tracing is not None and scope["path"] not in _PROBES:
            span = self._tracing.start(headers)
            record.trace_id = f"{span.get_span_context().trace_id:032x}"
        scope.setdefault("state", {})["record"] = record
        started = time.perf_counter()
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            fields = {"request_id": record.request_id}
            logger.exception("a request failed", extra={"fields": fields})
            if status is not None:
                # Too late for an error object: the server closes the connection.
                raise
            await internal_error().response()(scope, receive, send_with_id)
        finally:
            if record.disconnected or status is None:
                status = CLIENT_CLOSED_REQUEST
            path = getattr(scope.get("route"), "path", None)
            self._metrics.http_request(scope["method"], path, status)
            if self._tracing is not None and span is not None:
                self._tracing.end(span, scope["method"], path, status, record)
            _log(scope, record, status, time.perf_counter() - started)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    if 0 < len(given) <= _MAX_ID_LENGTH and given.isascii() and given.isprintable():
        return given
    return uuid.uuid4().hex


def _log(scope: Scope, record: RequestRecord, status: int, seconds: float) -> None:
    fields = {
        "request_id": record.request_id,
        "trace_id": record.trace_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "model": record.model,
        "generation": record.generation,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reasons": record.finish_reasons,
        "queue_seconds": _rounded(record.queue_time),
        "time_to_first_token_seconds": _rounded(record.time_to_first_token),
        "duration_seconds": _rounded(seconds),
    }
    level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
    logger.log(level, "request", extra={"fields": fields})


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


async def drop_body(receive: Receive, headers: Headers, seconds: float) -> bool:
    """Read the rest of a body that nobody wants; False where it is too much, too slow or not sent.

    Closing on a client that is still sending resets its connection, and it never sees the reply;
    so the rest is read, unless the client waits to be asked for it.
    """
    size = 0
    more = True
    try:
        async with asyncio.timeout(seconds):
            while more and size <= _MAX_DROPPED_BYTES and "expect" not in headers:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        return False
    return not more


class BodyLimit:
    """Reads a request's body; refuses one that exceeds `max_bytes`, or takes over `seconds`."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            read = await self._read(receive, Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return

        async def replay() -> Message:
            return read.popleft() if read else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive, headers: Headers) -> deque[Message]:
        declared = headers.get("content-length", "")
        too_large = declared.isdecimal() and int(declared) > self._max_bytes
        more = True
        read: deque[Message] = deque()
        size = 0
        try:
            async with asyncio.timeout(self._seconds):
                while more and not too_large:
                    message = await receive()
                    read.append(message)
                    size += len(message.get("body", b""))
                    too_large = size > self._max_bytes
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                408,
                f"The body did not come within {self._seconds:g} seconds.",
                headers={"Connection": "close"},
            ) from None
        if too_large:
            read.clear()
            complete = not more or await drop_body(receive, headers, self._seconds)
            raise ApiError(
                413,
                f"The body exceeds {self._max_bytes} bytes.",
                headers=None if complete else {"Connection": "close"},
            )
        return read
