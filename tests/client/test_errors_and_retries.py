"""Errors as classes, and which requests are sent again, when and how often."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from malora_client import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    InternalServerError,
    MaloraError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    UnprocessableEntityError,
)
from malora_client.retries import backoff, retry_after


class Script:
    """Gives the answers in turn; an exception among them is raised."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.count = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers[self.count]
        self.count += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


def ok() -> httpx.Response:
    return httpx.Response(200, json={"status": "ok"})


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (400, BadRequestError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (405, APIStatusError),
        (409, ConflictError),
        (413, PayloadTooLargeError),
        (422, UnprocessableEntityError),
        (429, RateLimitError),
        (500, InternalServerError),
        (503, InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_status_to_class(talk: Any, status: int, cls: type[APIStatusError], stream: bool) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        error = {"message": "No.", "type": "some_error", "param": "model", "code": "some_code"}
        return httpx.Response(status, json={"error": error}, headers={"x-request-id": "req-7"})

    with pytest.raises(MaloraError) as info:
        talk(
            handler,
            lambda c: c.completions.create(model="m", prompt="p", stream=stream),
            max_retries=0,
        )
    error = info.value
    assert type(error) is cls
    assert isinstance(error, APIStatusError)
    assert (error.status_code, error.message, error.type) == (status, "No.", "some_error")
    assert (error.param, error.code, error.request_id) == ("model", "some_code", "req-7")
    assert str(error) == f"No. (HTTP {status}, code some_code, request req-7)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<h1>Bad gateway</h1>", "<h1>Bad gateway</h1>"),
        (b"", "Bad Gateway"),
        (b"[1]", "[1]"),
        (b'{"error": "flat"}', '{"error": "flat"}'),
        (b'{"error": {}}', "The server sent no explanation."),
        (b"\xff\xfe", None),
    ],
)
def test_foreign_error_bodies(talk: Any, content: bytes, message: str | None) -> None:
    script = Script(httpx.Response(502, content=content))
    with pytest.raises(InternalServerError) as info:
        talk(script, lambda c: c.health(), max_retries=0)
    assert info.value.message == message or message is None
    assert info.value.code is None


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_passing_troubles_are_retried(talk: Any, sleeps: list[float], status: int) -> None:
    script = Script(httpx.Response(status), httpx.Response(status), ok())
    assert talk(script, lambda c: c.health()).status == "ok"
    assert sleeps == [0.5, 1.0]


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 405, 413, 422])
def test_lasting_troubles_are_not(talk: Any, sleeps: list[float], status: int) -> None:
    script = Script(httpx.Response(status), ok())
    with pytest.raises(APIStatusError):
        talk(script, lambda c: c.health())
    assert (script.count, sleeps) == (1, [])


@pytest.mark.parametrize("max_retries", [0, 1, 4])
def test_the_last_error_is_raised(talk: Any, sleeps: list[float], max_retries: int) -> None:
    script = Script(*(httpx.Response(503, text=f"try {n}") for n in range(9)))
    with pytest.raises(InternalServerError, match=f"try {max_retries}"):
        talk(script, lambda c: c.health(), max_retries=max_retries)
    assert script.count == max_retries + 1
    assert sleeps == [0.5, 1.0, 2.0, 4.0][:max_retries]


@pytest.mark.parametrize(
    "failure",
    [httpx.ConnectError, httpx.ConnectTimeout, httpx.ReadError, httpx.RemoteProtocolError],
)
@pytest.mark.parametrize("stream", [False, True])
def test_broken_connections_are_retried(
    talk: Any, sleeps: list[float], failure: type[httpx.RequestError], stream: bool
) -> None:
    done = httpx.Response(200, text="data: [DONE]\n\n")
    script = Script(failure("gone"), done if stream else ok())
    if stream:
        assert (
            talk(script, lambda c: c.completions.create(model="m", prompt="p", stream=True)) == []
        )
    else:
        talk(script, lambda c: c.health())
    assert sleeps == [0.5]

    script = Script(*(failure("gone") for _ in range(3)))
    with pytest.raises(APIConnectionError) as info:
        talk(script, lambda c: c.health(), base_url="http://user:pw@host:81")
    assert "http://host:81" in str(info.value)
    assert "pw" not in str(info.value)
    assert isinstance(info.value.__cause__, failure)


@pytest.mark.parametrize("failure", [httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout])
def test_a_reply_that_came_too_late_is_not_asked_for_again(
    talk: Any, sleeps: list[float], failure: type[httpx.RequestError]
) -> None:
    script = Script(failure("slow"), ok())
    with pytest.raises(APITimeoutError, match=r"timeout for http://127\.0\.0\.1:8000 ran out"):
        talk(script, lambda c: c.health())
    assert (script.count, sleeps) == (1, [])


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-4"}, 0.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:27 GMT"}, 7.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after-ms": "x", "retry-after": "2"}, 2.0),
        ({}, None),
    ],
)
def test_retry_after_is_understood(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after(httpx.Headers(headers), now=1700000000.0) == expected


def test_retry_after_is_honoured(
    talk: Any, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1700000000.0)
    script = Script(
        httpx.Response(429, headers={"Retry-After": "7"}),
        httpx.Response(503, headers={"Retry-After": "Tue, 14 Nov 2023 22:13:40 GMT"}),
        httpx.Response(503, headers={"Retry-After-Ms": "40"}),
        httpx.Response(503),
        ok(),
    )
    talk(script, lambda c: c.health(), max_retries=4)
    assert sleeps == [7.0, 20.0, 0.04, 4.0]


def test_a_server_that_asks_for_a_long_wait_is_not_waited_for(
    talk: Any, sleeps: list[float]
) -> None:
    script = Script(httpx.Response(429, headers={"Retry-After": "61"}), ok())
    with pytest.raises(RateLimitError):
        talk(script, lambda c: c.health())
    assert (script.count, sleeps) == (1, [])


def test_backoff_doubles_spreads_and_is_bounded() -> None:
    for retries, high in enumerate([0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]):
        delays = [backoff(retries) for _ in range(200)]
        assert high / 2 <= min(delays) < max(delays) <= high
