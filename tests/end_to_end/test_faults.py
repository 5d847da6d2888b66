"""What breaks inside the engine process, and around the server: memory, a step that hangs, a full
disk, clients that do not read or write, and more connections than anybody needs.
"""

import asyncio
import contextlib
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from malora.base_model import PATH as BASE

COMPLETIONS = "/v1/completions"
NUM_CONNECTIONS = 1500
FAULTS = """
import sys

if "malora_server.engine.process" in sys.orig_argv:
    import ctypes, os, signal, time
    import torch
    from malora_server.model.runner import ModelRunner

    def hang():
        while True:
            time.sleep(1)

    faults = {
        1: lambda: bytearray(1 << 62),
        2: lambda: torch.empty(1 << 50),
        3: hang,
        4: lambda: os.kill(os.getpid(), signal.SIGKILL),
        5: lambda: ctypes.string_at(0),
    }
    run = ModelRunner.run

    def faulty(self, chunks, *rest):
        for chunk in chunks:
            if chunk.token_ids[:3] == [9, 9, 9]:
                faults[chunk.token_ids[3]]()
        return run(self, chunks, *rest)

    ModelRunner.run = faulty
"""
MEMORY_ERROR, ALLOCATION_FAILS, HANG, KILLED, CRASH = range(1, 6)


@pytest.fixture(scope="module")
def server(
    launch: Callable[..., Any], adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server whose engine breaks when a prompt of token ids says so."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "sitecustomize.py").write_text(FAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        flags = ("--adapters", adapters, "--kv-cache-memory", "64MiB", "--shutdown-timeout", 2)
        server = launch(
            "--base", BASE, "--served-model-name", "base", *flags, "--engine-timeout", 3
        )
    yield server
    server.kill()


def body(index: int, max_tokens: int = 12, **fields: Any) -> dict[str, Any]:
    return {
        "model": ("base", "experts", "lora")[index % 3],
        "prompt": f"Count from {index}:",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **fields,
    }


def fault(code: int, **fields: Any) -> dict[str, Any]:
    return body(1, prompt=[9, 9, 9, code], **fields)


async def ask(http: httpx.AsyncClient, fields: dict[str, Any]) -> httpx.Response:
    return await http.post(COMPLETIONS, json=fields)


def text_of(reply: httpx.Response) -> str:
    text: str = reply.raise_for_status().json()["choices"][0]["text"]
    return text


def error_of(reply: httpx.Response, status: int) -> str:
    assert reply.status_code == status
    code: str = reply.json()["error"]["code"]
    return code


async def wait_until_healthy(http: httpx.AsyncClient, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while (await http.get("/health")).status_code != 200:
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("code", [MEMORY_ERROR, ALLOCATION_FAILS])
async def test_a_request_that_memory_runs_out_for_fails_alone(server: Any, code: int) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        want = [text_of(await ask(http, body(index))) for index in range(6)]
        neighbours = [asyncio.create_task(ask(http, body(index))) for index in range(6)]
        refused = await asyncio.gather(ask(http, fault(code)), ask(http, fault(code, stream=True)))
        assert [error_of(reply, 500) for reply in refused] == ["engine_error"] * 2
        assert "its log" in refused[0].json()["error"]["message"]
        assert [text_of(reply) for reply in await asyncio.gather(*neighbours)] == want
        assert "malora_engine_restarts_total 0.0" in (await http.get("/metrics")).text


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (HANG, "the engine said nothing for 3 s while"),
        (CRASH, "the engine was killed by SIGSEGV"),
        (KILLED, "the engine was killed by SIGKILL"),
    ],
)
async def test_an_engine_that_hangs_or_crashes_is_replaced(
    server: Any, code: int, words: str
) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        await wait_until_healthy(http)
        want = text_of(await ask(http, body(1)))
        engine = server.engine()
        replies = await asyncio.gather(
            ask(http, fault(code)), ask(http, body(1, 500)), ask(http, body(2, 500))
        )
        assert [error_of(reply, 503) for reply in replies] == ["engine_dead"] * 3
        await wait_until_healthy(http)
        assert server.engine().pid != engine.pid
        assert text_of(await ask(http, body(1))) == want
    log = server.log.read_text()
    assert words in log
    if code == HANG:
        assert "in hang" in log, "the log does not tell where it hung"
    if code == CRASH:
        assert "in string_at" in log


async def test_a_full_disk_stops_the_log_and_nothing_else(server: Any) -> None:
    processes = [server.process.pid, server.engine().pid]
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        want = [text_of(await ask(http, body(index))) for index in range(3)]
        size = server.log.stat().st_size
        limits = [resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, -1)) for pid in processes]
        try:
            assert [text_of(await ask(http, body(index))) for index in range(3)] == want
            assert error_of(await ask(http, fault(MEMORY_ERROR)), 500) == "engine_error"
            assert error_of(await ask(http, body(0, model="absent")), 404) == "model_not_found"
            assert (await http.get("/metrics")).status_code == 200
            assert server.log.stat().st_size == size
        finally:
            for pid, limit in zip(processes, limits, strict=True):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
        text_of(await ask(http, body(1)))
        async with asyncio.timeout(5):
            while server.log.stat().st_size <= size:
                await asyncio.sleep(0.05)


IDLE = """
import resource, socket, sys
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
sockets = [socket.create_connection((host, port), 30) for _ in range(count)]
print("open", flush=True)
sys.stdin.read()
"""


async def test_many_idle_connections_leave_room_for_requests(server: Any) -> None:
    await many_connections(server, NUM_CONNECTIONS)


async def many_connections(server: Any, count: int) -> None:
    address = urlsplit(server.url)
    api = psutil.Process(server.process.pid)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        want = text_of(await ask(http, body(1)))
        before = api.num_fds()
        command = [sys.executable, "-c", IDLE, address.hostname, address.port, count]
        idlers = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert idlers.stdout is not None
            line = await asyncio.to_thread(idlers.stdout.readline)
            assert line == b"open\n"
            # The system has them all; the server takes them in as it comes round to it.
            async with asyncio.timeout(60):
                while api.num_fds() < before + count:
                    await asyncio.sleep(0.1)
            assert text_of(await ask(http, body(1))) == want
        finally:
            idlers.kill()
            idlers.wait()
        async with asyncio.timeout(30):
            while api.num_fds() > before + 5:
                await asyncio.sleep(0.1)
        assert text_of(await ask(http, body(1))) == want


def connect(url: str, head: str, content: str = "") -> socket.socket:
    address = urlsplit(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((address.hostname, address.port))
    connection.sendall(f"{head}\r\n\r\n{content}".encode())
    return connection


async def test_sigterm_does_not_wait_for_those_who_do_not_read_or_write(server: Any) -> None:
    """The last test here: it ends the server."""
    post = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    long = json.dumps(body(1, 900, stream=True, logprobs=5))
    url = server.url
    with contextlib.ExitStack() as stack:
        for head, content in [
            (f"{post}Content-Length: {len(long)}", long),  # reads nothing
            (f"{post}Content-Length: 1000", '{"model": '),  # sends half a body
            (f"{post}Content-Le", ""),  # half a head
            ("GET /health HTTP/1.1\r\nHost: x", ""),  # keeps its connection
        ] * 3:
            stack.enter_context(connect(url, head, content))
        await asyncio.sleep(1)
        engine = server.engine()
        started = time.monotonic()
        assert await asyncio.to_thread(server.stop, 30) == 0
        assert time.monotonic() - started < 15
        assert not engine.is_running()
    assert list(server.log.parent.glob("malora-*")) == []
