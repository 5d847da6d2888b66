"""Streams from a pretended server: their chunks, their end, their errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from malora_client import (
    APIConnectionError,
    APIError,
    AuthenticationError,
    BadRequestError,
    Client,
    InternalServerError,
    PermissionDeniedError,
    RateLimitError,
    Stream,
)


def chunk(text: str, **extra: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": None, **extra}
    return {"id": "c", "created": 1, "model": "m", "choices": [choice]}


def event(data: Any) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


USAGE = {
    "id": "c",
    "created": 1,
    "model": "m",
    "choices": [],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}
DONE = b"data: [DONE]\n\n"


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that comes in pieces, may break, and knows whether it was read and closed."""

    def __init__(self, pieces: list[bytes], failure: Exception | None = None) -> None:
        self.pieces = pieces
        self.failure = failure
        self.taken = 0
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            self.taken += 1
            yield piece
        if self.failure:
            raise self.failure

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def stream(client: Any) -> Any:
    return client.completions.create(model="m", prompt="p", stream=True)


def serve(body: Body) -> Any:
    headers = {"content-type": "text/event-stream", "x-request-id": "req-9"}
    return lambda request: httpx.Response(200, headers=headers, stream=body)


def test_chunks_in_order_up_to_done(talk: Any) -> None:
    routing = [{"token": "ü", "experts": [{"expert": 1, "gate": 1.0}]}]
    whole = event(chunk("a\u2028")) + b": beat\n\n" + event(chunk("ü€", routing=routing))
    whole += event(USAGE) + DONE
    body = Body([whole[i : i + 3] for i in range(0, len(whole), 3)])
    chunks = talk(serve(body), stream)
    assert [c.choices[0].text for c in chunks[:2]] == ["a\u2028", "ü€"]
    assert chunks[1].choices[0].routing[0].experts[0].expert == 1
    assert (chunks[2].choices, chunks[2].usage.total_tokens) == ([], 3)
    assert len(chunks) == 3
    assert body.closed


def test_nothing_is_read_after_done(talk: Any) -> None:
    body = Body([event(chunk("a")) + DONE, b"data: garbage\n\n", b"more"])
    assert len(talk(serve(body), stream)) == 1
    assert body.taken == 1
    assert body.closed


def test_chat_chunks(talk: Any) -> None:
    def of(delta: dict[str, str]) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        return event({"id": "c", "created": 1, "model": "m", "choices": [choice]})

    seen: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(200, content=of({"role": "assistant"}) + of({"content": "x"}) + DONE)

    messages = [{"role": "user", "content": "hi"}]
    chunks = talk(
        handler, lambda c: c.chat.completions.create(model="m", messages=messages, stream=True)
    )
    assert seen == [{"model": "m", "messages": messages, "stream": True}]
    assert [c.choices[0].delta.role for c in chunks] == ["assistant", None]
    assert chunks[1].choices[0].delta.content == "x"


@pytest.mark.parametrize(
    ("kind_of_error", "cls"),
    [
        ("invalid_request_error", BadRequestError),
        ("authentication_error", AuthenticationError),
        ("permission_error", PermissionDeniedError),
        ("rate_limit_error", RateLimitError),
        ("server_error", InternalServerError),
        (None, InternalServerError),
    ],
)
def test_an_error_in_mid_stream(talk: Any, kind_of_error: str | None, cls: type) -> None:
    error = {"message": "The engine died.", "type": kind_of_error, "param": None, "code": "gone"}
    body = Body([event(chunk("a")), event({"error": error}), DONE])
    with pytest.raises(cls) as info:
        talk(serve(body), stream)
    assert (info.value.message, info.value.code) == ("The engine died.", "gone")
    assert info.value.status_code == cls.status_code  # type: ignore[attr-defined]
    assert info.value.request_id == "req-9"
    assert body.closed


def test_an_error_that_is_no_object(talk: Any) -> None:
    with pytest.raises(InternalServerError, match="boom"):
        talk(serve(Body([event({"error": "boom"})])), stream)


def test_a_stream_without_its_end_mark_is_not_taken_for_whole(talk: Any) -> None:
    body = Body([event(chunk("a"))])
    with pytest.raises(APIConnectionError, match="ended before its end mark"):
        talk(serve(body), stream)
    assert body.closed


def test_a_stream_that_breaks_is_never_begun_again(talk: Any, sleeps: list[float]) -> None:
    begun: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        begun.append(request)
        return httpx.Response(200, stream=Body([event(chunk("a"))], httpx.ReadError("reset")))

    with pytest.raises(APIConnectionError, match="reset"):
        talk(handler, stream)
    assert len(begun) == 1
    assert sleeps == []


@pytest.mark.parametrize("data", [b"data: {oops\n\n", b'data: {"id": 1}\n\n', b"data: 5\n\n"])
def test_an_unreadable_chunk_is_an_api_error(talk: Any, data: bytes) -> None:
    with pytest.raises(APIError, match="is no CompletionChunk"):
        talk(serve(Body([data])), stream)


def open_stream(body: Body) -> Stream[Any]:
    http = httpx.Client(transport=httpx.MockTransport(serve(body)))
    return Client(http_client=http).completions.create(model="m", prompt="p", stream=True)


def test_next_then_a_loop_goes_on_where_it_was() -> None:
    chunks = open_stream(Body([event(chunk(t)) for t in "abc"] + [DONE]))
    assert next(chunks).choices[0].text == "a"
    assert [c.choices[0].text for c in chunks] == ["b", "c"]
    with pytest.raises(StopIteration):
        next(chunks)


def test_close_before_the_first_chunk() -> None:
    body = Body([event(chunk("a")), DONE])
    with open_stream(body) as chunks:
        pass
    assert body.closed
    assert body.taken == 0
    assert list(chunks) == []
    chunks.close()


def test_leaving_the_loop_closes() -> None:
    body = Body([event(chunk("a")), event(chunk("b")), DONE])
    chunks = open_stream(body)
    for _ in chunks:
        break
    assert body.closed
    assert body.taken == 1
