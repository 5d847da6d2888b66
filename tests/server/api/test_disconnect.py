"""A client that goes away frees what it held, at once."""

import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest


def wait_for(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def logged_statuses(caplog: pytest.LogCaptureFixture) -> list[int]:
    records = [r for r in caplog.records if r.name == "malora_server.requests"]
    return [record.__dict__["fields"]["status"] for record in records]


def _post(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port))
    content = msgspec.json.encode(body)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_its_sequences_are_aborted(
    url: str, engine: Any, stream: bool, n: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    engine.num_until_blocked = 3
    body = {"model": "tiny", "prompt": "a fox", "max_tokens": 50, "n": n, "stream": stream}
    connection = _post(url, "/v1/completions", body)
    if stream:
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    wait_for(lambda: len(engine.submits) == n)
    assert engine.aborted == []
    connection.close()
    wait_for(lambda: len(engine.aborted) == n)
    assert sorted(engine.aborted) == sorted(submit.request_id for submit in engine.submits)
    wait_for(lambda: logged_statuses(caplog) == [499])
    assert caplog.text.count("Traceback") == 0
    # Its place is free again, and the neighbours are unharmed.
    engine.num_until_blocked = None
    reply = httpx.post(f"{url}/v1/completions", json={**body, "n": 12, "stream": False}, timeout=60)
    assert reply.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_stays_to_the_end_is_none(
    url: str, engine: Any, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    body = {"model": "tiny", "prompt": "a fox", "max_tokens": 3, "stream": stream}
    httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    wait_for(lambda: logged_statuses(caplog) == [200])
    assert engine.aborted == []


def test_one_that_leaves_while_sending_its_body(url: str, engine: Any) -> None:
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname, parts.port))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b'Content-Length: 500\r\n\r\n{"model": "tiny", "prompt": "'
    )
    connection.close()
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200
    assert engine.submits == []
