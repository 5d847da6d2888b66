"""One way to drive either client against a pretended server, so that each test covers both."""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections.abc import Callable
from typing import Any, Literal

import httpx
import pytest

from malora_client import AsyncClient, AsyncStream, Client, Stream

Handler = Callable[[httpx.Request], httpx.Response]
Talk = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALORA_BASE_URL", "MALORA_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Literal["sync", "async"]:
    return request.param


@pytest.fixture
def talk(kind: str) -> Talk:
    """`talk(handler, use, **options)`: what `use(client)` gives; of a stream, all its chunks."""

    def talk_sync(handler: Handler, use: Callable[[Any], Any], **options: Any) -> Any:
        with httpx.Client(transport=httpx.MockTransport(handler)) as http:
            reply = use(Client(http_client=http, **options))
            return list(reply) if isinstance(reply, Stream) else reply

    def talk_async(handler: Handler, use: Callable[[Any], Any], **options: Any) -> Any:
        async def main() -> Any:
            async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as http:
                reply = use(AsyncClient(http_client=http, **options))
                reply = await reply if inspect.isawaitable(reply) else reply
                return [c async for c in reply] if isinstance(reply, AsyncStream) else reply

        return asyncio.run(main())

    return talk_sync if kind == "sync" else talk_async


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds the client would have slept; the jitter is taken at its upper end."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    return slept
