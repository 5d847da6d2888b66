"""A client's connection: uvicorn's own, and the time and room that it has for what it must do."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from malora_server.api.errors import ApiError

_MAX_HEADER_BYTES = 64 * 2**10


class Connection(HttpToolsProtocol):
    """Ends where a client does not send its headers, or does not read its reply.

    Both within `client_timeout` seconds. A reply is not read while the buffers are full; how fast
    it is read does not matter. The end of a connection looks to its request as if the client had
    closed it. (The time for a body is the application's to measure, which can still reply.)
    """

    def __init__(self, *args: Any, client_timeout: float, **kwargs: Any) -> None:
        """All but `client_timeout` is uvicorn's to say."""
        super().__init__(*args, **kwargs)
        self._client_timeout = client_timeout
        self._header_bytes = 0
        self._in_headers = True
        self._num_messages = 0
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request (asyncio)."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the time-outs (asyncio)."""
        super().connection_lost(exc)
        self._headers_came()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Take what the client sent (asyncio)."""
        before = self._num_messages
        super().data_received(data)
        if not self._in_headers or self._num_messages > before or self.transport.is_closing():
            return
        # A request's headers have begun, and have not ended in what came.
        self._header_bytes += len(data)
        if self._header_bytes > _MAX_HEADER_BYTES:
            self._refuse(
                ApiError(
                    431,
                    f"The request's headers exceed {_MAX_HEADER_BYTES} bytes.",
                    code="headers_too_large",
                )
            )
        elif self._headers_due is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        """Begin a request (httptools)."""
        self._headers_came()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """End a request's body (httptools)."""
        super().on_message_complete()
        self._num_messages += 1
        self._in_headers = True
        self._header_bytes = 0

    def on_response_complete(self) -> None:
        """Go on to the next request (uvicorn)."""
        super().on_response_complete()
        self._abort_unread()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection without a request (uvicorn)."""
        super().timeout_keep_alive_handler()
        self._abort_unread()

    def pause_writing(self) -> None:
        """Stop the reply where the client is slower than it (asyncio)."""
        super().pause_writing()
        if self._reading_due is None:
            self._reading_due = self.loop.call_later(self._client_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on with the reply (asyncio)."""
        super().resume_writing()
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP (uvicorn)."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # a reply here would end up in the midst of another
            return
        body = error.body()
        self.transport.write(
            STATUS_LINE[error.status]
            + b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
            + b"connection: close\r\n\r\n"
            + body
        )
        self.transport.close()
        self._abort_unread()

    def _await_headers(self) -> None:
        self._headers_due = self.loop.call_later(self._client_timeout, self.transport.abort)

    def _headers_came(self) -> None:
        self._in_headers = False
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _abort_unread(self) -> None:
        """Let no connection that is closed wait for ever for its client to take the rest."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(self._client_timeout, self.transport.abort)
