"""Streamed replies, as iterators."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import httpx

from malora_client.calls import Call
from malora_client.errors import connection_error
from malora_client.types import Reply

ChunkT = TypeVar("ChunkT", bound=Reply)


class Stream(Generic[ChunkT]):
    """The chunks of a reply, as they come: an iterator, and a context manager.

    Leaving the `with` block, or a `for` loop over the stream, before its end closes the
    connection, upon which the server stops generating. An error of the server in mid-stream is
    raised as its class; a stream that breaks off raises `APIConnectionError`.
    """

    def __init__(self, call: Call[ChunkT], response: httpx.Response) -> None:
        self._response = response
        self._chunks = self._read(call)

    def _read(self, call: Call[ChunkT]) -> Generator[ChunkT, None, None]:
        reader = call.chunks(self._response)
        try:
            for piece in self._response.iter_bytes():
                yield from reader.feed(piece)
                if reader.done:
                    return
        except httpx.RequestError as exc:
            raise connection_error(exc) from exc
        finally:
            self._response.close()
        raise reader.broken_off()

    def __next__(self) -> ChunkT:
        return next(self._chunks)

    def __iter__(self) -> Iterator[ChunkT]:
        # A generator of its own: a loop that is left drops it, and with it the connection.
        yield from self._chunks

    def close(self) -> None:
        """Close the connection; harmless when it is closed already."""
        self._chunks.close()
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncStream(Generic[ChunkT]):
    """As `Stream`, with `async for` and `async with`.

    A loop that is left early closes the connection at the event loop's next turn; `async with`
    closes it before going on.
    """

    def __init__(self, call: Call[ChunkT], response: httpx.Response) -> None:
        self._response = response
        self._chunks = self._read(call)

    async def _read(self, call: Call[ChunkT]) -> AsyncGenerator[ChunkT, None]:
        reader = call.chunks(self._response)
        try:
            async for piece in self._response.aiter_bytes():
                for chunk in reader.feed(piece):
                    yield chunk
                if reader.done:
                    return
        except httpx.RequestError as exc:
            raise connection_error(exc) from exc
        finally:
            await self._response.aclose()
        raise reader.broken_off()

    async def __anext__(self) -> ChunkT:
        return await anext(self._chunks)

    async def __aiter__(self) -> AsyncIterator[ChunkT]:
        try:
            async for chunk in self._chunks:
                yield chunk
        finally:
            await self._chunks.aclose()

    async def close(self) -> None:
        """Close the connection; harmless when it is closed already."""
        await self._chunks.aclose()
        await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
