"""A server that cannot start, drains, loses its engine, or is lost to its engine."""

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from malora.base_model import PATH as BASE

COMPLETIONS = "/v1/completions"
NUM_STREAMS = 6
FLAGS: dict[str, tuple[object, ...]] = {
    "drains": ("--shutdown-timeout", 30),
    "drains at once": ("--shutdown-timeout", 0),
    "is hurried": ("--shutdown-timeout", 30),
    "restarts its engine": (),
    "ends with its engine": ("--no-restart",),
    "is killed": (),
}


@dataclass(frozen=True)
class Servers:
    """One for each test, all started at once; two of them were ended while they loaded."""

    ready: dict[str, Any]
    stopped: Any
    killed: Any
    orphan: psutil.Process


@pytest.fixture(scope="module")
def servers(launch: Callable[..., Any], adapters: Path) -> Servers:
    """The test's own servers, beside the one that other tests share."""
    flags = ("--base", BASE, "--adapters", adapters, "--kv-cache-memory", "64MiB")
    stopped, killed = launch(*flags), launch(*flags)
    ready = {part: launch(*flags, *extra) for part, extra in FLAGS.items()}
    stopped.engine()
    stopped.process.send_signal(signal.SIGTERM)
    orphan = killed.engine()
    killed.process.kill()
    return Servers(ready, stopped, killed, orphan)


def body(index: int, max_tokens: int, **fields: Any) -> dict[str, Any]:
    model = (BASE.name, "experts", "lora")[index % 3]
    return {
        "model": model,
        "prompt": f"Count from {index}:",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


async def start_stream(http: httpx.AsyncClient, index: int, max_tokens: int) -> AsyncIterator[str]:
    """The payloads of a stream, of which the first has come already."""

    async def events() -> AsyncIterator[str]:
        fields = body(index, max_tokens, stream=True)
        async with http.stream("POST", COMPLETIONS, json=fields) as reply:
            assert reply.status_code == 200
            async for line in reply.aiter_lines():
                if line:
                    yield line.removeprefix("data: ")

    payloads = events()
    await anext(payloads)
    return payloads


@contextlib.asynccontextmanager
async def load(
    url: str, max_tokens: int
) -> AsyncIterator[tuple[list[Awaitable[list[str]]], Awaitable[httpx.Response]]]:
    """Streams that run, and one reply that is awaited whole."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        for index in range(3):  # so that all that follow run at once, none waits for its adapter
            (await http.post(COMPLETIONS, json=body(index, 1))).raise_for_status()
        streams = [await start_stream(http, index, max_tokens) for index in range(NUM_STREAMS)]

        async def rest(stream: AsyncIterator[str]) -> list[str]:
            return [payload async for payload in stream]

        whole = asyncio.create_task(http.post(COMPLETIONS, json=body(1, max_tokens)))
        reading = [asyncio.create_task(rest(stream)) for stream in streams]
        running = f'requests_running{{model_name="{BASE.name}"}} {NUM_STREAMS + 1}.0'
        async with asyncio.timeout(20):
            while running not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.02)
        yield reading, whole


def check_cut_off(payloads: list[str], code: str) -> None:
    *chunks, last, done = payloads
    assert done == "[DONE]"
    assert json.loads(last)["error"]["code"] == code
    assert all("choices" in json.loads(chunk) for chunk in chunks)


def wait_until_gone(process: psutil.Process, seconds: float) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.wait(seconds)


async def test_sigterm_lets_requests_finish(servers: Servers) -> None:
    server = servers.ready["drains"]
    engine = server.engine()
    url = server.url
    async with load(url, 150) as (reading, whole):
        server.process.send_signal(signal.SIGTERM)
        engine.send_signal(signal.SIGTERM)  # as a supervisor does that signals the whole group
        await asyncio.sleep(0.2)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", timeout=60)
        for payloads in await asyncio.gather(*reading):
            assert payloads[-1] == "[DONE]"
            assert json.loads(payloads[-2])["choices"][0]["finish_reason"] == "length"
        assert (await whole).json()["usage"]["completion_tokens"] == 150
    assert server.process.wait(20) == 0
    wait_until_gone(engine, 1)
    check_clean(server)


async def test_sigterm_ends_what_the_time_to_drain_is_too_short_for(
    servers: Servers,
) -> None:
    server = servers.ready["drains at once"]
    engine = server.engine()
    async with load(server.url, 900) as (reading, whole):
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        for payloads in await asyncio.gather(*reading):
            check_cut_off(payloads, "shutdown")
        check_refused(await whole, "shutdown")
    assert server.process.wait(20) == 0
    assert time.monotonic() - started < 5
    wait_until_gone(engine, 1)
    check_clean(server)


async def test_a_second_sigterm_ends_what_runs_at_once(servers: Servers) -> None:
    server = servers.ready["is hurried"]
    async with load(server.url, 900) as (reading, whole):
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        for payloads in await asyncio.gather(*reading):
            check_cut_off(payloads, "shutdown")
        check_refused(await whole, "shutdown")
    assert server.process.wait(20) == 0
    assert time.monotonic() - started < 5
    check_clean(server)


def check_clean(server: Any) -> None:
    assert "Traceback" not in server.log.read_text()
    assert list(server.log.parent.glob("malora-*")) == [], "temporary files stayed behind"


def check_refused(reply: httpx.Response, code: str) -> None:
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == code


async def test_a_lost_engine_fails_what_ran_and_is_started_again(servers: Servers) -> None:
    server = servers.ready["restarts its engine"]
    engine = server.engine()
    url = server.url
    before = [completion(url, index) for index in range(3)]
    async with load(url, 900) as (reading, whole):
        engine.kill()
        for payloads in await asyncio.gather(*reading):
            check_cut_off(payloads, "engine_dead")
        for reply in (
            await whole,
            httpx.get(f"{url}/health", timeout=60),
            httpx.post(f"{url}{COMPLETIONS}", json=body(0, 2), timeout=60),
            httpx.post(f"{url}{COMPLETIONS}", json=body(0, 2, stream=True), timeout=60),
        ):
            check_refused(reply, "engine_dead")
            assert int(reply.headers["retry-after"]) >= 1
    assert httpx.get(f"{url}/v1/models", timeout=60).status_code == 200
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/health", timeout=60).status_code != 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert server.engine().pid != engine.pid
    assert not engine.is_running()
    assert [completion(url, index) for index in range(3)] == before
    assert "malora_engine_restarts_total 1.0" in httpx.get(f"{url}/metrics", timeout=60).text
    log = server.log.read_text()
    assert "the engine was killed by SIGKILL" in log
    assert "the engine serves again" in log
    assert server.stop(20) == 0
    check_clean(server)


def completion(url: str, index: int) -> str:
    reply = httpx.post(f"{url}{COMPLETIONS}", json=body(index, 12), timeout=60)
    text: str = reply.raise_for_status().json()["choices"][0]["text"]
    return text


async def test_without_restart_a_lost_engine_ends_the_server(servers: Servers) -> None:
    server = servers.ready["ends with its engine"]
    engine = server.engine()
    async with load(server.url, 900) as (reading, whole):
        engine.kill()
        for payloads in await asyncio.gather(*reading):
            check_cut_off(payloads, "engine_dead")
        check_refused(await whole, "engine_dead")
    assert server.process.wait(20) == 1
    last = server.log.read_text().splitlines()[-1]
    assert last.startswith("error: the engine was killed by SIGKILL")
    check_clean(server)


async def test_an_engine_whose_server_is_killed_ends_by_itself(servers: Servers) -> None:
    server = servers.ready["is killed"]
    engine = server.engine()
    async with load(server.url, 900) as (reading, whole):
        server.process.kill()
        await asyncio.gather(*reading, whole, return_exceptions=True)
    wait_until_gone(engine, 30)
    check_clean(server)


def test_an_engine_that_loads_when_its_server_is_killed_ends_too(servers: Servers) -> None:
    assert servers.killed.process.wait(5) == -signal.SIGKILL
    assert '"serving ' not in servers.killed.log.read_text()
    wait_until_gone(servers.orphan, 10)
    check_clean(servers.killed)


def test_sigterm_ends_a_server_that_still_loads(servers: Servers) -> None:
    assert servers.stopped.process.wait(20) == 0
    assert '"serving ' not in servers.stopped.log.read_text()
    check_clean(servers.stopped)


@pytest.fixture(scope="module")
def failures(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each failing start left: its exit status, and its words. All run at once."""
    nowhere = tmp_path_factory.mktemp("start") / "nowhere"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags: dict[str, tuple[object, ...]] = {
            "port": ("--port", port),
            "base": ("--base", nowhere),
            "adapters": ("--adapters", nowhere),
            "value": ("--max-num-seqs", "many"),
            "flag": ("--warp-speed", 9),
            "quantization": ("--device", "cpu", "--quantization", "fp8"),
        }
        started = {name: launch(*values) for name, values in flags.items()}
        statuses = {name: server.process.wait(120) for name, server in started.items()}
    words = {name: server.log.read_text() for name, server in started.items()}
    return port, nowhere, statuses, words


def test_a_failure_to_start_is_one_line_and_a_status(failures: Any) -> None:
    port, nowhere, statuses, words = failures
    assert set(statuses.values()) == {2}
    hints = {
        "port": f"127.0.0.1:{port}: Address already in use",
        "base": str(nowhere),
        "adapters": str(nowhere),
        "value": "--max-num-seqs",
        "flag": "--warp-speed",
        "quantization": "compute capability 8.9",
    }
    for name, hint in hints.items():
        assert words[name].startswith("error: "), words[name]
        assert words[name].count("\n") == 1, words[name]
        assert hint in words[name]
        assert len(words[name]) < 400
