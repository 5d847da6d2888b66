"""Both clients against a real HTTP server: what a pretended one can't show."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from malora_client import (
    APIConnectionError,
    APITimeoutError,
    AsyncClient,
    Client,
    CompletionParams,
    RateLimitError,
)


@dataclass
class Server:
    """A server whose completion does what the prompt says; counts requests, notes goodbyes."""

    url: str = ""
    left: threading.Event = field(default_factory=threading.Event)
    requests: int = 0

    async def complete(self, request: Request) -> Response:
        self.requests += 1
        what = (await request.json())["prompt"]
        if what == "busy":
            if self.requests == 1:
                error = {"message": "Full.", "type": "rate_limit_error", "code": "queue_full"}
                return JSONResponse({"error": error}, 429, headers={"Retry-After": "0.2"})
            return JSONResponse(self.chunk("done"))
        if what == "slow":
            await asyncio.sleep(0.6)
        return StreamingResponse(self.stream(what), media_type="text/event-stream")

    def chunk(self, text: str) -> dict[str, object]:
        choices = [{"index": 0, "text": text, "finish_reason": None}]
        return {"id": "c", "created": 1, "model": "m", "choices": choices}

    async def stream(self, what: str) -> AsyncIterator[bytes]:
        try:
            if what == "cut":
                for byte in f"data: {json.dumps(self.chunk('ü€😀'), ensure_ascii=False)}".encode():
                    yield bytes([byte])
                    await asyncio.sleep(0)
                yield b"\r\n\r\ndata: [DONE]\r\n\r\n"
                return
            for n in range(1000):
                yield f"data: {json.dumps(self.chunk(str(n)))}\n\n".encode()
                if what == "crash":
                    raise ConnectionResetError("on purpose")
                await asyncio.sleep(0.6 if what == "stall" else 0.01)
        finally:
            self.left.set()


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    app = Starlette(routes=[Route("/v1/completions", state.complete, methods=["POST"])])
    config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        state.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield state
        server.should_exit = True
        thread.join()


def ask(what: str) -> CompletionParams:
    return {"model": "m", "prompt": what}


def test_leaving_a_loop_early_tells_the_server(server: Server) -> None:
    with Client(base_url=server.url) as client:
        stream = client.completions.create(**ask("endless"), stream=True)
        for n, chunk in enumerate(stream):
            assert chunk.choices[0].text == str(n)
            if n == 3:
                break
        assert server.left.wait(5)


def test_leaving_a_with_block_early_tells_the_server(server: Server) -> None:
    with Client(base_url=server.url) as client:
        with client.completions.create(**ask("endless"), stream=True) as stream:
            assert next(stream).choices[0].text == "0"
        assert server.left.wait(5)


async def test_leaving_an_async_loop_early_tells_the_server(server: Server) -> None:
    async with AsyncClient(base_url=server.url) as client:
        stream = await client.completions.create(**ask("endless"), stream=True)
        async for chunk in stream:
            assert chunk.choices[0].text == "0"
            break
        assert await asyncio.to_thread(server.left.wait, 5)


async def test_leaving_an_async_with_block_early_tells_the_server(server: Server) -> None:
    async with AsyncClient(base_url=server.url) as client:
        async with await client.completions.create(**ask("endless"), stream=True) as stream:
            await anext(stream)
        assert await asyncio.to_thread(server.left.wait, 5)


async def test_cancelling_the_task_tells_the_server(server: Server) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in await client.completions.create(**ask("endless"), stream=True):
            begun.set()

    async with AsyncClient(base_url=server.url) as client:
        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.left.wait, 5)


async def test_characters_cut_by_the_network(server: Server) -> None:
    with Client(base_url=server.url) as client:
        chunks = list(client.completions.create(**ask("cut"), stream=True))
    assert [c.choices[0].text for c in chunks] == ["ü€😀"]
    async with AsyncClient(base_url=server.url) as async_client:
        stream = await async_client.completions.create(**ask("cut"), stream=True)
        assert [c.choices[0].text async for c in stream] == ["ü€😀"]


def test_a_late_reply_times_out_once(server: Server) -> None:
    with (
        Client(base_url=server.url, timeout=0.2) as client,
        pytest.raises(APITimeoutError, match="read timeout"),
    ):
        client.completions.create(**ask("slow"))
    assert server.requests == 1


async def test_a_stalled_stream_times_out(server: Server) -> None:
    with Client(base_url=server.url, timeout=0.2) as client:
        stream = client.completions.create(**ask("stall"), stream=True)
        assert next(stream).choices[0].text == "0"
        with pytest.raises(APITimeoutError):
            next(stream)
    async with AsyncClient(base_url=server.url, timeout=0.2) as async_client:
        async_stream = await async_client.completions.create(**ask("stall"), stream=True)
        assert (await anext(async_stream)).choices[0].text == "0"
        with pytest.raises(APITimeoutError):
            await anext(async_stream)


async def test_a_stream_the_server_drops_is_an_error(server: Server) -> None:
    with Client(base_url=server.url) as client, pytest.raises(APIConnectionError):
        list(client.completions.create(**ask("crash"), stream=True))
    async with AsyncClient(base_url=server.url) as async_client:
        with pytest.raises(APIConnectionError):
            async for _ in await async_client.completions.create(**ask("crash"), stream=True):
                pass
    assert server.requests == 2


async def test_retry_after_is_waited_for(server: Server) -> None:
    async with AsyncClient(base_url=server.url) as async_client:
        start = time.monotonic()
        assert (await async_client.completions.create(**ask("busy"))).choices[0].text == "done"
        assert 0.2 <= time.monotonic() - start < 2
    server.requests = 0
    with Client(base_url=server.url) as client:
        start = time.monotonic()
        assert client.completions.create(**ask("busy")).choices[0].text == "done"
        assert 0.2 <= time.monotonic() - start < 2
        server.requests = 0
        with pytest.raises(RateLimitError) as info:
            client.with_options(max_retries=0).completions.create(**ask("busy"))
        assert info.value.code == "queue_full"


async def test_no_server() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Bound but not listening: connections are refused.
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with (
            Client(base_url=url, max_retries=0) as client,
            pytest.raises(APIConnectionError) as info,
        ):
            client.health()
        assert url in str(info.value)
        async with AsyncClient(base_url=url, max_retries=0) as async_client:
            with pytest.raises(APIConnectionError):
                await async_client.health()


async def test_many_at_once(server: Server) -> None:
    async with AsyncClient(base_url=server.url) as client:

        async def first_of_stream() -> str:
            async with await client.completions.create(**ask("endless"), stream=True) as stream:
                return (await anext(stream)).choices[0].text

        assert await asyncio.gather(*(first_of_stream() for _ in range(150))) == ["0"] * 150
