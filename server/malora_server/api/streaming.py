"""Server-sent events, and what becomes of a request whose client goes away."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import cached_property
from typing import Any, Protocol

import anyio
import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from malora_server.api.errors import ApiError, internal_error
from malora_server.api.generation import Delta, Generation
from malora_server.api.state import RequestRecord

logger = logging.getLogger(__name__)

encode_json = msgspec.json.Encoder().encode
_DONE = b"data: [DONE]\n\n"
CLIENT_CLOSED_REQUEST = 499
"""For the log and the metrics alone: nobody is there to read it."""


def event(payload: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + payload + b"\n\n"


class ChunkWriter(Protocol):
    """Writes one kind of reply's chunks."""

    def chunk(self, delta: Delta) -> bytes:
        """The event for a delta; b'' where the client would learn nothing from it."""

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The last event of a stream that was asked for its usage."""


class ChunkFrame:
    """The parts of a stream's chunks that never change, encoded once: with the first of them."""

    def __init__(self, generation: Generation, id: str, object: str, *, with_usage: bool) -> None:
        self._generation = generation
        self._id = id
        self._object = object
        self.tail = (b'}],"usage":null}' if with_usage else b"}]}") + b"\n\n"
        """Everything after the choice's last field."""

    @cached_property
    def _envelope(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._object,
            "created": self._generation.created,
            "model": self._generation.model.name,
            "system_fingerprint": self._generation.fingerprint,
        }

    def heads(self, following: bytes) -> list[bytes]:
        """By choice: everything up to the choice's index, and what follows it."""
        opening = b"data: " + encode_json(self._envelope)[:-1] + b',"choices":[{"index":'
        choices = self._generation.choices
        return [opening + str(choice.index).encode() + following for choice in choices]

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The chunk without choices."""
        return event(encode_json({**self._envelope, "choices": [], "usage": usage}))


async def collect_until_disconnect(
    receive: Receive, generation: Generation, record: RequestRecord
) -> list[list[Delta]] | None:
    """Each choice's deltas, complete; None where the client left, which ends the sequences."""
    collected: list[list[Delta]] = [[] for _ in generation.choices]

    async def collect() -> None:
        async with aclosing(generation.batches()) as batches:
            async for batch in batches:
                for delta in batch:
                    collected[delta.index].append(delta)

    if await run_until_disconnect(receive, collect):
        return collected
    record.disconnected = True
    return None


async def run_until_disconnect(receive: Receive, work: Callable[[], Awaitable[None]]) -> bool:
    """Run `work`, cancelled as soon as the client is gone. False where it was."""
    disconnected = False

    async def watch() -> None:
        nonlocal disconnected
        while (await receive())["type"] != "http.disconnect":
            pass
        disconnected = True
        group.cancel_scope.cancel()

    failure: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            await work()
        except Exception as error:
            # Kept out of the task group, which would wrap it in an ExceptionGroup.
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return not disconnected


class EventStream(Response):
    """Streams a generation as it runs.

    The reply begins with the first chunk: what fails before it gets its proper status. A failure
    after it is one event with the error object; every stream ends with [DONE].
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        writer: ChunkWriter,
        record: RequestRecord,
        *,
        with_usage: bool,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer
        self._record = record
        self._with_usage = with_usage
        self._ending = b""

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream (ASGI)."""
        if await run_until_disconnect(receive, lambda: self._send_chunks(send)):
            # Sent when nobody watches any more: a complete reply looks like a disconnect.
            body = self._ending + _DONE
            await send({"type": "http.response.body", "body": body, "more_body": False})
        else:
            self._record.disconnected = True

    async def _send_chunks(self, send: Send) -> None:
        chunk = self._writer.chunk
        started = False
        try:
            async with aclosing(self._generation.batches()) as batches:
                async for batch in batches:
                    data = chunk(batch[0]) if len(batch) == 1 else b"".join(map(chunk, batch))
                    if not data:
                        continue
                    if not started:
                        started = True
                        await send(
                            {
                                "type": "http.response.start",
                                "status": self.status_code,
                                "headers": self.raw_headers,
                            }
                        )
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            if self._with_usage:
                self._ending = self._writer.usage_chunk(self._generation.usage())
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, ApiError):
                fields = {"request_id": self._record.request_id}
                logger.exception("a stream failed", extra={"fields": fields})
                error = internal_error()
            self._ending = event(error.body())
